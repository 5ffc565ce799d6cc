"""Measure the accuracy of linear probes on the frozen features of networks; print JSON.

The L2 penalty of a probe is chosen on held-out parts of the training images, its accuracy measured
on the validation images. With ``--sklearn`` the best accuracy of scikit-learn's LogisticRegression
over the same penalties is reported too. That one is chosen on the validation images: it is an
optimistic reference.

    python benchmarks/accuracy.py FOLDER [FOLDER ...] --weights NAME [NAME ...]
"""

import tljax

tljax.configure()

import json
import time
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import tyro

from tljax.data.examples import Splits
from tljax.data.options import Loading
from tljax.data.sources import open_splits
from tljax.features.extract import Outputs, compute_features
from tljax.features.probe import L2_VALUES, fit_probe, predict_logits
from tljax.pretrained import Pretrained, load_pretrained
from tljax.train.run_directory import environment


@dataclass(frozen=True)
class Config:
    """Accuracies of linear probes of networks on folders of images."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders with one subfolder per class, or digits."""
    weights: tuple[str, ...] = ("efficientnet_lite0.in1k",)
    """Pretrained weights, as in tljax train."""
    protocol: bool = False
    """Resize the short side to 224 pixels (bicubic) and crop the center, which is the linear-probe
    protocol of SimCLR and BYOL, instead of the preprocessing that the weights expect."""
    sklearn: bool = False
    """Also fit scikit-learn's LogisticRegression, at every fourth L2 penalty."""


def measure(pretrained: Pretrained, splits: Splits, *, sklearn: bool) -> dict[str, object]:
    """Return the accuracies of one network on one data set."""
    began = time.perf_counter()
    train, val = (
        compute_features(
            pretrained.model, pretrained.variables, source, Loading(), description="features"
        )
        for source in splits[:2]
    )
    extracted = time.perf_counter()
    probe = fit_probe(train.values, train.labels, num_classes=len(splits.train.classes))
    correct = predict_logits(probe, val.values).argmax(1) == val.labels
    return {
        "val_top1": round(float(correct.mean()), 4),
        "l2": probe.l2,
        "train": len(train.labels),
        "val": len(val.labels),
        "features_seconds": round(extracted - began, 1),
        "probe_seconds": round(time.perf_counter() - extracted, 1),
        **({"sklearn_best_on_val": _sklearn(train, val)} if sklearn else {}),
    }


def _sklearn(train: Outputs, val: Outputs) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.values)
    scores = []
    for l2 in np.asarray(L2_VALUES)[::4]:
        model = LogisticRegression(C=1 / (l2 * len(train.labels)), max_iter=1000)
        model.fit(scaler.transform(train.values), train.labels)
        scores.append(model.score(scaler.transform(val.values), val.labels))
    return round(float(max(scores)), 4)


def main() -> None:
    """Run the benchmark and print its report as JSON."""
    config = tyro.cli(Config)
    results = {}
    for weights in config.weights:
        pretrained = load_pretrained(weights)
        if config.protocol:
            preprocess = replace(
                pretrained.model.preprocess, size=224, resize=224, interpolation="bicubic"
            )
            model = replace(pretrained.model, preprocess=preprocess)
            pretrained = pretrained._replace(model=model)
        for data in config.data:
            result = measure(pretrained, open_splits(data), sklearn=config.sklearn)
            results[f"{weights} on {data}"] = result
    print(json.dumps({"environment": environment(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
