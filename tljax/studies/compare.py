"""Compare backbones: linear probe accuracy on the same images, and speed."""

from typing import NamedTuple

import jax

from tljax.data.examples import Splits
from tljax.data.options import Loading
from tljax.features.evaluate import evaluate
from tljax.features.extract import images_per_second, split_features
from tljax.features.source_probe import fit_source_probe, probe_outputs
from tljax.metrics.bootstrap import Interval
from tljax.pretrained import Pretrained
from tljax.train.run_directory import skipped_rows
from tljax.train.setup import fitted_task


class Candidate(NamedTuple):
    """Accuracy, speed and size of one network on given images.

    Attributes:
        name: name of the weights.
        model: name of the architecture.
        metric: name of the most important metric of the task, see `METRICS`.
        value: that metric of a linear probe on the validation images.
        interval: 95% confidence interval of ``value``, by a bootstrap.
        images_per_second: speed of feature extraction on all devices, without reading images.
        parameters: number of parameters of the backbone, without the head.
        features: number of features per image.
        size: height and width of the input images, in pixels.
    """

    name: str
    model: str
    metric: str
    value: float
    interval: Interval
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
    """Fit a linear probe on the pooled features of a network, and time the extraction.

    Args:
        name: name of the weights.
        network: network with any head.
        splits: training and validation images.
        loading: options of how images are read; its batch size is timed.
        seed: seed of the split that chooses the L2 penalty of the probe.
        skipped: dict that receives {name: reason} of unreadable images.

    Raises:
        RequestError: no image can be read.
    """
    model, variables, _ = network
    train, val = split_features(model, variables, splits, loading, name=f"{name}: ")
    if skipped is not None:
        parts = ((splits.train, train), (splits.val, val))
        skipped.update(row for source, out in parts for row in skipped_rows(source, out.skipped))
    task = fitted_task(splits.train)
    probe = fit_source_probe(train, splits.train, task, seed=seed)
    evaluation = evaluate(probe_outputs(probe, val), task)
    metric = evaluation.main_metric
    nothing = Interval(float("nan"), float("nan"))
    head = model.stage_names[-1]
    backbone = {stage: tree for stage, tree in variables["params"].items() if stage != head}
    return Candidate(
        name,
        model.name,
        metric,
        evaluation.metric(metric),
        evaluation.intervals(splits.val, [metric]).get(metric, nothing),
        images_per_second(model, variables, loading),
        sum(leaf.size for leaf in jax.tree.leaves(backbone)),
        train.values.shape[1],
        model.preprocess.size,
    )
