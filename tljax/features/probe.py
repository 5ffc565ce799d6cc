"""Linear probes and nearest neighbours: what are these features worth, without training a network?

The L2 sweep of the linear-evaluation protocol (Kornblith et al. 2019,
https://arxiv.org/abs/1805.08974; SimCLR, https://arxiv.org/abs/2002.05709; BYOL,
https://arxiv.org/abs/2006.07733) is a path of convex problems over the same features, so one call
of ``fit_logistic`` solves all of them to the optimum.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.features.logistic import checked, finite, fit_logistic
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

L2_VALUES: tuple[float, ...] = tuple(np.logspace(-6, 5, 45).tolist())
"""The protocol's 45 log-spaced values, beside a *mean* over examples here: see fit_logistic."""

_MEMORY_BUDGET = 2**30  # bytes for one block of similarities
_FOLDS = 5
_CROSS_VALIDATION_LIMIT = 1_000  # examples; with more of them a single fold settles the L2 value


class Probe(NamedTuple):
    """A linear classifier on raw features and how its L2 value was chosen from ``k`` candidates.

    Attributes:
        kernel: ``[d, c]`` float32, with the standardisation folded in: it drops into a dense head.
        bias: ``[c]`` float32.
        l2: the value chosen; it weighs the kernel on standardised features.
        l2_values: ``[k]`` the candidates.
        held_out_accuracy: ``[k]`` share of the held-out examples that were classified correctly.
        held_out_loss: ``[k]`` mean cross-entropy of the held-out examples, in nats.
        converged: whether the final fit reached its tolerance.
    """

    kernel: jax.Array
    bias: jax.Array
    l2: float
    l2_values: np.ndarray
    held_out_accuracy: np.ndarray
    held_out_loss: np.ndarray
    converged: bool


def fit_probe(
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    l2_values: Array | Sequence[float] = L2_VALUES,
    seed: int = 0,
) -> Probe:
    """Fits a linear probe to training features; its L2 value comes from held-out parts of them.

    Features are standardised (a constant one is only centred). Up to 1,000 examples, every L2 value
    is scored by stratified 5-fold cross-validation; with more, one such fold of 20% is held out.
    The only example of a class is never held out. The highest accuracy over all held-out examples
    wins, ties go to the lowest cross-entropy; the winner is then fitted to every example.

    Args:
        features: ``[n, d]``, finite; used in float32.
        labels: ``[n]`` int class indices in [0, num_classes).
        num_classes: ``c``.
        l2_values: ``[k]`` candidates, positive; see fit_logistic for what they multiply.
        seed: of the assignment of examples to folds.

    Raises:
        RequestError: as fit_logistic, or no class has two examples, so none can be held out.
    """
    features, labels = checked(features, labels, num_classes)
    l2_values = np.asarray(l2_values, np.float64)
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    standardized = features - mean
    # In float64, where no square overflows, and without a copy of the features.
    squares = np.einsum("nd,nd->d", standardized, standardized, dtype=np.float64)
    scale = np.sqrt(squares / len(labels)).astype(np.float32)
    # A spread within float32's rounding of the values is none, and dividing would make it one.
    scale[scale <= 4 * np.finfo(np.float32).eps * np.abs(mean)] = 1
    standardized /= scale

    held_out = _held_out(labels, seed)
    if not held_out.any():
        raise RequestError(
            "no class has two examples, so none can be held out to choose an L2 value: "
            "add images, or call fit_logistic with a value of your own"
        )
    # The last row of weights leaves nothing out: the probe, should its L2 value win.
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


def predict_logits(probe: Probe, features: Array) -> jax.Array:
    """Logits ``[m, c]`` of raw features ``[m, d]``."""
    return jnp.matmul(features, probe.kernel, precision="highest") + probe.bias


def knn_predict(
    train_features: Array,
    train_labels: Array,
    features: Array,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> jax.Array:
    """Classifies by the ``k`` training examples of highest cosine similarity.

    A neighbour of similarity ``s`` votes for its class with weight ``exp(s / temperature)``; the
    votes are normalised. Source: Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4,
    with the constants of DINO's evaluation, https://arxiv.org/abs/2104.14294.

    Args:
        train_features: ``[n, d]``, finite; used in float32. A vector of zeros has similarity 0.
        train_labels: ``[n]`` int class indices in [0, num_classes).
        features: ``[m, d]``, finite.
        num_classes: ``c``.
        k: neighbours that vote; all ``n`` where there are fewer. Of equally similar ones the
            earlier in ``train_features`` come first.
        temperature: positive; smaller trusts the nearest more.

    Returns:
        ``[m, c]`` probabilities.

    Raises:
        RequestError: an array has the wrong shape or range, or holds values that are not finite, or
            fewer than two classes have examples.
    """
    train_features, train_labels = checked(train_features, train_labels, num_classes)
    features = finite(features)
    block = max(1, _MEMORY_BUDGET // (8 * len(train_labels)))
    known, known_labels = _unit(train_features), jnp.asarray(train_labels)
    votes = [
        _vote(
            known,
            known_labels,
            features[start : start + block],
            temperature,
            num_classes=num_classes,
            k=min(k, len(train_labels)),
        )
        for start in range(0, len(features), block)
    ]
    return jnp.concatenate(votes)


def _held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """``[folds, n]`` bool: which examples each fold holds out."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    # Dealt out class after class, so that neither a class nor the whole is lopsided.
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % _FOLDS
    fold[np.bincount(labels)[labels] == 1] = -1
    num_folds = _FOLDS if len(labels) <= _CROSS_VALIDATION_LIMIT else 1
    return fold == np.arange(num_folds)[:, None]


@jax.jit
def _score(features, labels, kernels, biases, held_out):
    """Correct answers and summed cross-entropy ``[k]``, each fold's fits on what it held out."""

    def score(total, fold):
        kernels, biases, mask = fold

        def at_one_l2(kernel_bias):
            kernel, bias = kernel_bias
            logits = jnp.matmul(features, kernel, precision="highest") + bias
            own = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
            loss = jax.nn.logsumexp(logits, 1) - own
            return jnp.sum(mask * (logits.argmax(1) == labels)), jnp.sum(mask * loss)

        scores = jax.lax.map(at_one_l2, (kernels, biases))
        return jax.tree.map(jnp.add, total, scores), None

    zeros = jnp.zeros(kernels.shape[1], int), jnp.zeros(kernels.shape[1])
    return jax.lax.scan(score, zeros, (kernels[:-1], biases[:-1], held_out))[0]


@jax.jit
def _unit(x):
    # First by a power of two, which rounds nothing, so that no square over- or underflows.
    x = jnp.ldexp(x, -jnp.frexp(jnp.abs(x).max(1, keepdims=True))[1])
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


@partial(jax.jit, static_argnames=("num_classes", "k"))
def _vote(known, known_labels, features, temperature, *, num_classes, k):
    similarity = jnp.matmul(_unit(features), known.T, precision="highest")
    similarity, nearest = jax.lax.top_k(similarity, k)
    weight = jax.nn.softmax(similarity / temperature)
    return jnp.einsum("mk,mkc->mc", weight, jax.nn.one_hot(known_labels[nearest], num_classes))
