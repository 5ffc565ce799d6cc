"""The linear probe of a source, for its task."""

import numpy as np
from jax.sharding import Mesh

from tljax.data.examples import Source, balancing_weights
from tljax.features.extract import Outputs
from tljax.features.probe import Probe, fit_task_probe, predict_logits
from tljax.runtime.task import Task


def fit_source_probe(
    features: Outputs,
    source: Source,
    task: Task,
    *,
    balance: bool = False,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Probe:
    """Fit a linear probe to the features of a source, weighted and in folds as the source says.

    Args:
        features: features ``[n, d]`` of ``source``.
        source: the examples, with their weights and groups.
        task: what is learned; for ``regression`` with mean and scale.
        balance: whether to weight examples such that all classes or labels have the same sum.
        seed: seed of the assignment of examples to folds.
        mesh: devices that share the examples; by default all.

    Returns:
        The probe, whose outputs are those of a head for the task.

    Raises:
        RequestError: the features or labels cannot be fitted; see `tljax.features.probe`.
    """
    weights = source.extra.get("weight")
    if balance:
        weights = balancing_weights(source) * (1 if weights is None else weights)
    labels = features.labels
    return fit_task_probe(
        task.kind,
        features.share,
        task.standardize(labels) if task.kind == "regression" else labels,
        num_outputs=task.num_outputs(len(source.classes)),
        weights=None if weights is None else np.asarray(weights)[features.indices],
        groups=None if source.groups is None else source.groups[features.indices],
        seed=seed,
        mesh=mesh,
    )


def probe_outputs(probe: Probe, features: Outputs) -> Outputs:
    """Return the outputs of a probe for features, as `compute_features(stop=None)` returns them."""
    return features._replace(values=np.asarray(predict_logits(probe, features.values)))
