"""Linear probes and nearest-neighbor classification of features.

The L2 sweep of the linear-evaluation protocol (Kornblith et al. 2019, arXiv:1805.08974; SimCLR,
arXiv:2002.05709; BYOL, arXiv:2006.07733) is a path of convex problems over the same features, so
one call of ``fit_logistic`` solves all of them to the optimum.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from tljax.features.logistic import check_features, check_training_data, fit_logistic
from tljax.metrics.classification import cross_entropies
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

L2_VALUES: tuple[float, ...] = tuple(np.logspace(-6, 5, 45).tolist())
"""The protocol's 45 log-spaced L2 values, here relative to the *mean* loss: see `fit_logistic`."""

_MEMORY_BUDGET = 2**30  # bytes of one block of similarities
_FOLDS = 5
_CROSS_VALIDATION_LIMIT = 1_000  # with more examples, one fold is enough to choose the L2 value


class Probe(NamedTuple):
    """A linear classifier of raw features, with the scores of the ``k`` candidate L2 values.

    Attributes:
        kernel: ``[d, c]`` float32, with the standardization folded in, so that it can be used as
            the kernel of a dense head.
        bias: ``[c]`` float32.
        l2: the chosen L2 value; it applies to the kernel of standardized features.
        l2_values: ``[k]`` the candidates.
        held_out_accuracy: ``[k]`` fraction of the held-out examples that are classified correctly.
        held_out_loss: ``[k]`` mean cross-entropy of the held-out examples, in nats.
        converged: whether the final fit reached its tolerance.
    """

    kernel: Float[jax.Array, "d c"]
    bias: Float[jax.Array, " c"]
    l2: float
    l2_values: Float[np.ndarray, " k"]
    held_out_accuracy: Float[np.ndarray, " k"]
    held_out_loss: Float[np.ndarray, " k"]
    converged: bool


def fit_probe(
    features: Float[Array, "n d"],
    labels: Integer[Array, " n"],
    *,
    num_classes: int,
    l2_values: Float[Array, " k"] | Sequence[float] = L2_VALUES,
    seed: int = 0,
) -> Probe:
    """Fit a linear probe to features, choosing the L2 value on held-out examples.

    Features are standardized; a constant feature is only centered. With up to 1,000 examples, each
    L2 value is scored by stratified 5-fold cross-validation; with more, a single fold of 20% is
    held out. The only example of a class is never held out. The L2 value with the highest accuracy
    over all held-out examples is chosen, or the one with the lowest cross-entropy among equals, and
    then fitted to all examples.

    Source: the linear-evaluation protocol of Kornblith et al. 2019, arXiv:1805.08974.

    Args:
        features: ``[n, d]`` finite features; used in float32.
        labels: ``[n]`` integer class indices in [0, num_classes).
        num_classes: number of classes, ``c``.
        l2_values: ``[k]`` positive candidates, in units of the mean loss; see `fit_logistic`. By
            default 45 log-spaced values from 1e-6 to 1e5.
        seed: seed of the assignment of examples to folds.

    Raises:
        RequestError: an array has the wrong shape or values out of range or not finite, fewer than
            two classes have examples, or no class has two examples, so none can be held out.
        DivergenceError: the values are finite, but too large to compute with.
    """
    features, labels = check_training_data(features, labels, num_classes)
    l2_values = np.asarray(l2_values, np.float64)
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    standardized = features - mean
    # In float64, so that no square overflows, and without a copy of the features.
    squares = np.einsum("nd,nd->d", standardized, standardized, dtype=np.float64)
    scale = np.sqrt(squares / len(labels)).astype(np.float32)
    # A spread within float32's rounding of the values is noise, which dividing would amplify.
    scale[scale <= 4 * np.finfo(np.float32).eps * np.abs(mean)] = 1
    standardized /= scale

    held_out = _held_out(labels, seed)
    if not held_out.any():
        raise RequestError("no class has two examples, so none can be held out: add images")
    # The last row of weights includes all examples, for the final fit at the chosen L2 value.
    fits = fit_logistic(
        standardized,
        labels,
        l2_values,
        num_classes=num_classes,
        weights=~np.concatenate([held_out, np.zeros((1, len(labels)), bool)]),
    )
    correct, loss = _score(standardized, labels, fits.kernel, fits.bias, held_out)
    accuracy, loss = np.asarray(correct) / held_out.sum(), np.asarray(loss) / held_out.sum()
    best = np.lexsort((loss, -accuracy))[0]

    kernel = np.asarray(fits.kernel[-1, best], np.float64) / scale[:, None]
    return Probe(
        kernel=jnp.asarray(kernel, jnp.float32),
        bias=jnp.asarray(np.asarray(fits.bias[-1, best]) - mean @ kernel, jnp.float32),
        l2=float(l2_values[best]),
        l2_values=l2_values,
        held_out_accuracy=accuracy,
        held_out_loss=loss,
        converged=bool(fits.converged[-1, best]),
    )


def predict_logits(probe: Probe, features: Float[Array, "m d"]) -> Float[jax.Array, "m c"]:
    """Compute the logits ``[m, c]`` of raw features ``[m, d]``."""
    return jnp.matmul(features, probe.kernel, precision="highest") + probe.bias


def knn_predict(
    train_features: Float[Array, "n d"],
    train_labels: Integer[Array, " n"],
    features: Float[Array, "m d"],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[jax.Array, "m c"]:
    """Classify features by their ``k`` nearest training examples in cosine similarity.

    A neighbor of similarity ``s`` votes for its class with weight ``exp(s / temperature)``; the
    votes are normalized.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4, with the constants of DINO's evaluation,
    arXiv:2104.14294.

    Args:
        train_features: ``[n, d]`` finite features; used in float32. A zero vector has similarity 0.
        train_labels: ``[n]`` integer class indices in [0, num_classes).
        features: ``[m, d]`` finite features to classify.
        num_classes: number of classes, ``c``.
        k: number of neighbors that vote, or all ``n`` if there are fewer. Among equally similar
            examples, earlier ones in ``train_features`` are chosen.
        temperature: positive; the smaller it is, the more the nearest neighbors dominate.

    Returns:
        ``[m, c]`` class probabilities.

    Raises:
        RequestError: an array has the wrong shape or values out of range or not finite, or fewer
            than two classes have examples.
    """
    train_features, train_labels = check_training_data(train_features, train_labels, num_classes)
    features = check_features(features)
    block = max(1, _MEMORY_BUDGET // (8 * len(train_labels)))
    vote = partial(_vote, _unit(train_features), jnp.asarray(train_labels), temperature)
    k = min(k, len(train_labels))
    parts = (features[start : start + block] for start in range(0, len(features), block))
    return jnp.concatenate([vote(part, num_classes=num_classes, k=k) for part in parts])


def _held_out(labels: Integer[np.ndarray, " n"], seed: int) -> Bool[np.ndarray, "folds n"]:
    """Choose the examples that each fold holds out."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    # Assigned round-robin, class after class, so that classes and folds are balanced.
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % _FOLDS
    fold[np.bincount(labels)[labels] == 1] = -1
    num_folds = _FOLDS if len(labels) <= _CROSS_VALIDATION_LIMIT else 1
    return fold == np.arange(num_folds)[:, None]


@jax.jit
def _score(features, labels, kernels, biases, held_out):
    """Sum the correct predictions and cross-entropies, ``[k]`` each, on the held-out examples."""

    def score(total, fold):
        kernels, biases, mask = fold

        def at_one_l2(kernel_bias):
            kernel, bias = kernel_bias
            logits = jnp.matmul(features, kernel, precision="highest") + bias
            loss = cross_entropies(logits, labels)
            return jnp.sum(mask * (logits.argmax(1) == labels)), jnp.sum(mask * loss)

        scores = jax.lax.map(at_one_l2, (kernels, biases))
        return jax.tree.map(jnp.add, total, scores), None

    zeros = jnp.zeros(kernels.shape[1], int), jnp.zeros(kernels.shape[1])
    return jax.lax.scan(score, zeros, (kernels[:-1], biases[:-1], held_out))[0]


@jax.jit
def _unit(x):
    # Scale by a power of two first, which is exact, so that no square over- or underflows.
    x = jnp.ldexp(x, -jnp.frexp(jnp.abs(x).max(1, keepdims=True))[1])
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


@partial(jax.jit, static_argnames=("num_classes", "k"))
def _vote(train_unit, train_labels, temperature, features, *, num_classes, k):
    similarity = jnp.matmul(_unit(features), train_unit.T, precision="highest")
    similarity, nearest = jax.lax.top_k(similarity, k)
    weight = jax.nn.softmax(similarity / temperature)
    return jnp.einsum("mk,mkc->mc", weight, jax.nn.one_hot(train_labels[nearest], num_classes))
