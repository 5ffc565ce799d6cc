"""Nearest-neighbor classification of features, with the training examples divided over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Integer

from tljax.features.design import check_features
from tljax.features.logistic import check_training_data
from tljax.features.rows import Layout, rows_per_device
from tljax.features.share import Share
from tljax.runtime.parallel import data_mesh
from tljax.runtime.types import Array

_MEMORY_BUDGET = 2**30  # bytes of one block of similarities on a device


def knn_predict(
    train_features: Float[Array, "n d"] | Share,
    train_labels: Integer[Array, " n"],
    features: Float[Array, "m d"] | Share,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "m c"]:
    """Classify features by their ``k`` nearest training examples in cosine similarity.

    A neighbor of similarity ``s`` votes for its class with weight ``exp(s / temperature)``; the
    votes are normalized.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4, with the constants of DINO's evaluation,
    arXiv:2104.14294.

    Args:
        train_features: ``[n, d]`` finite features, or the share of this process; used in float32. A
            zero vector has similarity 0.
        train_labels: ``[n]`` integer class indices in [0, num_classes).
        features: ``[m, d]`` finite features to classify, or the share of this process.
        num_classes: number of classes, ``c``.
        k: number of neighbors that vote, or all ``n`` if there are fewer. Among equally similar
            examples, earlier ones in ``train_features`` are chosen.
        temperature: positive; the smaller it is, the more the nearest neighbors dominate.
        mesh: devices that share the training examples; by default all.

    Returns:
        ``[m, c]`` class probabilities.

    Raises:
        RequestError: an array has the wrong shape or values out of range or not finite, or fewer
            than two classes have examples.
    """
    train_features, train_labels = check_training_data(train_features, train_labels, num_classes)
    queries, mesh = check_features(features), mesh or data_mesh()
    own, positions, n = train_features
    layout = Layout(mesh, 1, rows_per_device(len(own), mesh))
    train = (
        _unit_in_place(layout.place(own, np.float32, 0)),
        layout.place(train_labels[positions], np.int32, 0),
        layout.place(positions, np.int32, _PADDING),
    )
    block = max(1, _MEMORY_BUDGET // (8 * layout.rows))
    vote = partial(_vote, train, temperature, num_classes=num_classes, k=min(k, n), mesh=mesh)
    votes = np.empty((queries.total, num_classes), np.float32)
    for values, rows in queries.blocks():
        parts = (values[start : start + block] for start in range(0, len(rows), block))
        votes[rows] = np.concatenate([vote(np.asarray(part, np.float32)) for part in parts])
    return votes


_PADDING = np.iinfo(np.int32).max  # position of a row that is no example


def _unit(x):
    # Scale by a power of two first, which is exact, so that no square over- or underflows.
    x = jnp.ldexp(x, -jnp.frexp(jnp.abs(x).max(-1, keepdims=True))[1])
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


_unit_in_place = jax.jit(_unit, donate_argnums=0)


@partial(jax.jit, static_argnames=("num_classes", "k", "mesh"))
def _vote(train, temperature, features, *, num_classes, k, mesh):
    def nearest(train, queries):
        """Return the nearest of this device's examples, and of all devices' the nearest."""
        unit, labels, positions = (x[0, 0] for x in train)
        similarity = jnp.matmul(queries, unit.T, precision="highest")
        similarity = jnp.where(positions < _PADDING, similarity, -jnp.inf)
        similarity, chosen = jax.lax.top_k(similarity, min(k, len(labels)))
        found = jax.lax.all_gather(
            (-similarity, positions[chosen], labels[chosen]), "data", axis=1, tiled=True
        )
        distance, _, labels = jax.lax.sort(found, num_keys=2)  # of equals the earliest
        return -distance[:, :k], labels[:, :k]

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    similarity, labels = jax.shard_map(
        nearest, mesh=mesh, in_specs=(data, everywhere), out_specs=everywhere, check_vma=False
    )(train, _unit(features))
    weight = jax.nn.softmax(similarity / temperature)
    return jnp.einsum("mk,mkc->mc", weight, jax.nn.one_hot(labels, num_classes))
