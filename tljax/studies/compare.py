"""Which backbone? Every network is probed on the same images, and timed."""

from typing import NamedTuple

import jax
import numpy as np

from tljax.data.options import Loading
from tljax.data.sources import Splits
from tljax.features.extract import images_per_second, split_features
from tljax.features.probe import fit_probe, predict_logits
from tljax.metrics.classification import standard_error
from tljax.pretrained import Pretrained
from tljax.train.run_directory import skipped_rows


class Candidate(NamedTuple):
    """How one network does on somebody's images.

    Attributes:
        name: of its weights.
        model: of its architecture.
        val_top1: accuracy of a linear probe on the validation images, in [0, 1].
        error: its standard error.
        images_per_second: of the features, compiled, all devices; without reading the images.
        parameters: of the backbone, without the head.
        features: how many values the probe reads.
        size: side of the images, in pixels.
    """

    name: str
    model: str
    val_top1: float
    error: float
    images_per_second: float
    parameters: int
    features: int
    size: int


def measure(
    name: str,
    network: Pretrained,
    splits: Splits,
    loading: Loading,
    seed: int = 0,
    skipped: dict[str, str] | None = None,
) -> Candidate:
    """Probes the pooled features of a network, and times them.

    Args:
        name: what to call it.
        network: with any head.
        splits: the images to learn from and to be judged by.
        loading: see `Loading`; the batch size is what is timed.
        seed: of the choice of the probe's L2 value.
        skipped: where images that cannot be read are recorded, {name: reason}.

    Raises:
        RequestError: no image can be read.
    """
    model, variables, _ = network
    train, val = split_features(model, variables, splits, loading, name=f"{name}: ")
    if skipped is not None:
        parts = ((splits.train, train), (splits.val, val))
        skipped.update(row for part, of in parts for row in skipped_rows(part, of.skipped))
    classes = len(splits.train.classes)
    probe = fit_probe(train.values, train.labels, num_classes=classes, seed=seed)
    right = np.asarray(predict_logits(probe, val.values)).argmax(1) == val.labels
    top1 = float(right.mean())
    head = model.stage_names[-1]
    body = {stage: tree for stage, tree in variables["params"].items() if stage != head}
    return Candidate(
        name,
        model.name,
        top1,
        standard_error(top1, len(right)),
        images_per_second(model, variables, loading),
        sum(leaf.size for leaf in jax.tree.leaves(body)),
        train.values.shape[1],
        model.preprocess.size,
    )
