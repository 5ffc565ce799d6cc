"""Linear probes and nearest neighbours: what are these features worth, without training a network?

The L2 sweep of the linear-evaluation protocol (Kornblith et al. 2019,
https://arxiv.org/abs/1805.08974; SimCLR, https://arxiv.org/abs/2002.05709; BYOL,
https://arxiv.org/abs/2006.07733) is a batch of convex problems over the same features, so one
jitted loop solves all of them to the optimum. Three things make it quick; none of them moves the
optimum:

* The features are centred and rotated into the eigenbasis of their covariance. There the Hessian of
  every problem is nearly diagonal and known up to one number per class, which gives L-BFGS its
  initial inverse Hessian afresh at each iteration, whatever the L2 value and however
  ill-conditioned the features.
* Logits are linear in the parameters, so an almost exact line search needs no matrix product: an
  iteration costs one product forwards and one back.
* A solved problem hands its slot of the batch to the next in the queue: memory is bounded by the
  slots, and no problem waits for a harder one.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import RequestError
from tljax.types import Array

L2_VALUES: tuple[float, ...] = tuple(np.logspace(-6, 5, 45).tolist())
"""The protocol's 45 log-spaced values, beside a *mean* over examples here: see fit_logistic."""

_MEMORY_BUDGET = 2**30  # bytes for the problems in flight, or for one block of similarities
_SLOTS = 8  # problems in flight; more only wait for one another (measured on a CPU)
_HISTORY = 10  # pairs that L-BFGS remembers
_FOLDS = 5
_CROSS_VALIDATION_LIMIT = 1_000  # examples; with more of them a single fold settles the L2 value
_ABSENT = 1e-12  # examples that a class without any is taken to have, so that its bias is finite


class LogisticFit(NamedTuple):
    """The optima of ``k`` logistic regressions with ``d`` features and ``c`` classes.

    Attributes:
        kernel: ``[k, d, c]`` float32.
        bias: ``[k, c]`` float32; logits are ``features @ kernel + bias``. A number added to all
            classes alike changes nothing, so each row is made to sum to 0.
        objective: ``[k]`` the minimised objective.
        gradient_norm: ``[k]`` Euclidean norm of the objective's gradient with respect to the kernel
            and bias of the centred features.
        iterations: ``[k]`` int32 L-BFGS iterations.
        converged: ``[k]`` bool, False where ``max_iterations`` came before ``tolerance``.
    """

    kernel: jax.Array
    bias: jax.Array
    objective: jax.Array
    gradient_norm: jax.Array
    iterations: jax.Array
    converged: jax.Array


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


def fit_logistic(
    features: Array,
    labels: Array,
    l2: Array | Sequence[float],
    *,
    num_classes: int,
    weights: Array | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> LogisticFit:
    """Solves multinomial logistic regressions over the same features, all in one loop.

    Problem ``j`` minimises over kernel ``W`` and bias ``b``

        sum_i weights[j, i] * cross_entropy(features[i] @ W + b, labels[i]) / sum_i weights[j, i]
            + l2[j] / 2 * ||W||^2

    The bias is not penalised. scikit-learn's ``LogisticRegression`` has the same optimum at
    ``C = 1 / (n * l2)`` for ``n`` examples of weight 1. The protocol's papers do not say whether
    their 1e-6 to 1e5 multiplies the mean or the sum of the losses; for a sum, divide by ``n``. For
    the mean and standardised features the sweep covers everything: at 1e-6 separable data is
    fitted to a loss near 0, and once ``l2`` exceeds the Hessian of the loss (of order 1 to 10), the
    kernel shrinks as ``1 / l2`` and the predictions tend to the class frequencies.

    A problem is solved when ``||dW||^2 / l2 + sum_c db_c^2 / h_c <= 2 * tolerance * objective`` for
    the gradients ``dW`` and ``db`` and the bias's curvature ``h``. The objective is ``l2``-strongly
    convex in ``W``, so this bounds how far it lies above its optimum, relatively, by ``tolerance``.
    Features of which one axis is far longer than the rest cost accuracy in float32: standardise.

    A class without examples (of positive weight) is given 1e-12 of one: its kernel stays 0 and its
    bias finite.

    Source: L-BFGS with a variable initial matrix, Nocedal and Wright, *Numerical Optimization*,
    2nd edition, algorithm 7.4.

    Args:
        features: ``[n, d]``, finite; used in float32.
        labels: ``[n]`` int class indices in [0, num_classes).
        l2: ``[k]`` positive.
        num_classes: ``c``.
        weights: ``[k, n]`` weight of each example in each problem, not negative; 0 leaves an
            example out. None weighs all examples alike.
        max_iterations: of each problem.
        tolerance: largest relative distance of the objective from its optimum.

    Raises:
        RequestError: an array has the wrong shape or range, or holds values that are not finite, or
            fewer than two classes have examples.
    """
    features, labels = _checked(features, labels, num_classes)
    l2 = np.asarray(l2, np.float32)
    if l2.ndim != 1 or not l2.size or not (np.isfinite(l2) & (l2 > 0)).all():
        raise RequestError(f"l2 must be a list of positive numbers, got {l2}")
    weights = np.ones((len(l2), len(labels))) if weights is None else np.asarray(weights)
    if weights.shape != (len(l2), len(labels)) or (weights < 0).any() or not weights.any(1).all():
        raise RequestError(
            f"weights must be [{len(l2)}, {len(labels)}] (one row per l2 value, one column per "
            f"example), not negative and not all 0 in a row; got shape {list(weights.shape)}"
        )
    weights = np.asarray(weights / weights.sum(1, keepdims=True), np.float32)

    rows = min(features.shape) + 1
    slot_bytes = 4 * ((2 * _HISTORY + 6) * rows + 6 * len(labels)) * num_classes
    with jax.default_matmul_precision("highest"):
        basis = _eigenbasis(features)
        params, *rest = _solve(
            basis,
            jax.nn.one_hot(labels, num_classes, axis=0),
            weights,
            l2,
            tolerance,
            max_iterations,
            num_slots=max(1, min(_SLOTS, len(l2), _MEMORY_BUDGET // slot_bytes)),
        )
        kernel = jnp.einsum("dr,kcr->kdc", basis.rotation, params[:, :, :-1])
        bias = params[:, :, -1] - basis.mean @ kernel
        bias -= bias.mean(1, keepdims=True)
    return LogisticFit(kernel, bias, *rest)


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
    features, labels = _checked(features, labels, num_classes)
    l2_values = np.asarray(l2_values, np.float64)
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    standardized = features - mean
    scale = standardized.std(axis=0)
    # A spread within float32's rounding of the values is none, and dividing would make it one.
    scale[scale <= 4 * np.finfo(np.float32).eps * np.abs(mean)] = 1
    standardized /= scale

    held_out = _held_out(labels, seed)
    num_folds = len(held_out)
    if not held_out.any():
        raise RequestError(
            "no class has two examples, so none can be held out to choose an L2 value: "
            "add images, or call fit_logistic with a value of your own"
        )
    rows = np.tile(held_out, (len(l2_values), 1))
    sweep = fit_logistic(
        standardized,
        labels,
        np.repeat(l2_values, num_folds),
        num_classes=num_classes,
        weights=~rows,
        max_iterations=200,
        tolerance=1e-3,  # a choice between values needs no more
    )
    correct, loss = _score(standardized, labels, sweep.kernel, sweep.bias, rows)
    accuracy = np.asarray(correct).reshape(-1, num_folds).sum(1) / held_out.sum()
    loss = np.asarray(loss).reshape(-1, num_folds).sum(1) / held_out.sum()
    best = np.lexsort((loss, -accuracy))[0]

    fit = fit_logistic(standardized, labels, l2_values[best : best + 1], num_classes=num_classes)
    kernel = np.asarray(fit.kernel[0], np.float64) / scale[:, None]
    return Probe(
        kernel=jnp.asarray(kernel, jnp.float32),
        bias=jnp.asarray(np.asarray(fit.bias[0]) - mean @ kernel, jnp.float32),
        l2=float(l2_values[best]),
        l2_values=l2_values,
        held_out_accuracy=accuracy,
        held_out_loss=loss,
        converged=bool(fit.converged[0]),
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
    train_features, train_labels = _checked(train_features, train_labels, num_classes)
    features = _finite(features)
    block = max(1, _MEMORY_BUDGET // (8 * len(train_labels)))
    votes = [
        _vote(
            train_features,
            train_labels,
            features[start : start + block],
            temperature,
            num_classes=num_classes,
            k=min(k, len(train_labels)),
        )
        for start in range(0, len(features), block)
    ]
    return jnp.concatenate(votes)


def _finite(features: Array) -> np.ndarray:
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not features.size:
        raise RequestError(f"features must be [examples, dimensions], got {list(features.shape)}")
    bad = np.count_nonzero(~np.isfinite(features))
    if bad:
        raise RequestError(
            f"{bad} of {features.size} feature values are not finite numbers: "
            "check the weights and the preprocessing of the network that made them"
        )
    return features


def _checked(features: Array, labels: Array, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    features, labels = _finite(features), np.asarray(labels)
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        raise RequestError(
            f"labels must be {len(features)} integers, one per row of the features, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise RequestError(
            f"labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}: "
            "leave out examples without a label, or raise num_classes"
        )
    if labels.min() == labels.max():
        raise RequestError(
            f"all {len(labels)} examples are of class {labels[0]}: a classifier needs two classes"
        )
    return features, labels.astype(np.int32)


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
    """Correct answers and summed cross-entropy of each problem's held-out examples."""

    def score(problem):
        kernel, bias, mask = problem
        logits = jnp.matmul(features, kernel, precision="highest") + bias
        loss = jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
        return jnp.sum(mask * (logits.argmax(1) == labels)), jnp.sum(mask * loss)

    return jax.lax.map(score, (kernels, biases, held_out))


@partial(jax.jit, static_argnames=("num_classes", "k"))
def _vote(train_features, train_labels, features, temperature, *, num_classes, k):
    def unit(x):
        norm = jnp.linalg.norm(x, axis=1, keepdims=True)
        return x / jnp.where(norm > 0, norm, 1)

    similarity = jnp.matmul(unit(features), unit(train_features).T, precision="highest")
    similarity, nearest = jax.lax.top_k(similarity, k)
    weight = jax.nn.softmax(similarity / temperature)
    return jnp.einsum("mk,mkc->mc", weight, jax.nn.one_hot(train_labels[nearest], num_classes))


class _Eigenbasis(NamedTuple):
    """Centred features in the basis of their principal axes, with a column of ones for the bias.

    Attributes:
        design: ``[n, r + 1]`` for ``r = min(n, d)``: the optimum of an L2-penalised problem lies in
            the span of the centred features.
        spectrum: ``[r + 1]`` mean square of each column of the design.
        rotation: ``[d, r]`` orthonormal columns.
        mean: ``[d]``.
    """

    design: jax.Array
    spectrum: jax.Array
    rotation: jax.Array
    mean: jax.Array


@jax.jit
def _eigenbasis(features) -> _Eigenbasis:
    n, d = features.shape
    mean = features.mean(0)
    centred = features - mean

    def principal_axes(x):
        return jnp.linalg.eigh(x.T @ x / n)[1]

    if n < d:
        span = jnp.linalg.qr(centred.T)[0]
        rotation = span @ principal_axes(centred @ span)
    else:
        rotation = principal_axes(centred)
    design = jnp.concatenate([centred @ rotation, jnp.ones((n, 1))], axis=1)
    return _Eigenbasis(design, jnp.mean(design**2, 0), rotation, mean)


class _Slots(NamedTuple):
    """The problems in flight: ``s`` slots, ``r`` rows of kernel and bias, ``m`` remembered pairs.

    Attributes:
        problem: ``[s]`` index of the problem; ``k``, one past the last, where none is left.
        iterations: ``[s]``.
        params: ``[s, c, r]`` kernel in the eigenbasis, and the bias in the last column.
        margins: ``[s, c, n]`` logits minus the logit of the example's own class.
        gradient: ``[s, c, r]`` at the params before the last step.
        step: ``[s, c, r]`` the last one.
        steps: ``[m, s, c, r]`` ring of past steps.
        changes: ``[m, s, c, r]`` ring of the changes of gradient along them.
        rho: ``[m, s]`` 1 / <step, change>; 0 for a pair not to be used.
    """

    problem: jax.Array
    iterations: jax.Array
    params: jax.Array
    margins: jax.Array
    gradient: jax.Array
    step: jax.Array
    steps: jax.Array
    changes: jax.Array
    rho: jax.Array


@partial(jax.jit, static_argnames=("num_slots",))
def _solve(basis, onehot, weights, l2, tolerance, max_iterations, *, num_slots):
    """Params ``[k, c, r]`` and the other fields of LogisticFit. Rows of ``weights`` sum to 1."""
    design, spectrum = basis.design, basis.spectrum
    rows, num_classes, num_problems = design.shape[1], len(onehot), len(l2)
    is_kernel = jnp.arange(rows) < rows - 1
    queue = jnp.argsort(l2)  # the hardest first, so that nothing long is left for the end

    def start(problem):
        """Kernel 0 and the best bias for it: the logarithm of the class frequencies."""
        bias = jnp.log(jnp.maximum(onehot @ weights[problem], _ABSENT))
        params = jnp.zeros((num_classes, rows)).at[:, -1].set(bias)
        return params, bias[:, None] - bias @ onehot

    def iterate(carry):
        trip, taken, slots, fit = carry
        problem = jnp.minimum(slots.problem, num_problems - 1)  # an empty slot idles on the last
        weight, penalty = weights[problem], jnp.where(is_kernel, l2[problem, None, None], 0)
        objective, gradient, curvature = jax.vmap(_evaluate, (None, None, 0, 0, 0, 0))(
            design, onehot, weight, penalty, slots.params, slots.margins
        )

        # A solved problem leaves.
        bound = jnp.sum(gradient**2 / jnp.where(is_kernel, penalty, curvature), (1, 2)) / 2
        # One step at least: a huge L2 starts within any tolerance, but with a kernel of zeros.
        converged = (bound <= tolerance * objective) & (slots.iterations > 0)
        finished = converged | (slots.iterations >= max_iterations)
        norm = jnp.sqrt(jnp.sum(gradient**2, (1, 2)))
        result = (slots.params, objective, norm, slots.iterations, converged)
        to = jnp.where(finished, slots.problem, num_problems)
        fit = tuple(x.at[to].set(y, mode="drop") for x, y in zip(fit, result, strict=True))

        # The others take a step.
        change = gradient - slots.gradient
        product = jnp.sum(slots.step * change, (1, 2))
        newest = trip % _HISTORY
        steps = slots.steps.at[newest].set(slots.step)
        changes = slots.changes.at[newest].set(change)
        # A pair whose product is lost in rounding would blow the direction up.
        sizes = jnp.linalg.norm(slots.step, axis=(1, 2)) * jnp.linalg.norm(change, axis=(1, 2))
        usable = product > 1e-6 * sizes
        rho = slots.rho.at[newest].set(jnp.where(usable, 1 / product, 0))
        direction = jax.vmap(_direction, (0, 1, 1, 1, 0, None))(
            gradient, steps, changes, rho, 1 / (spectrum * curvature + penalty), newest
        )
        margins = jax.vmap(_margins, (None, None, 0))(design, onehot, direction)
        slope = jnp.sum(gradient * direction, (1, 2))
        length = jax.vmap(_line_search)(
            weight, penalty, slots.params, slots.margins, direction, margins, slope
        )[:, None, None]

        # The next of the queue come in.
        place = taken + jnp.cumsum(finished) - 1
        entering = jnp.where(place < num_problems, queue[place], num_problems)
        fresh_params, fresh_margins = jax.vmap(start)(entering)
        fresh = finished[:, None, None]
        slots = _Slots(
            problem=jnp.where(finished, entering, slots.problem),
            iterations=jnp.where(finished, 0, slots.iterations + 1),
            params=jnp.where(fresh, fresh_params, slots.params + length * direction),
            margins=jnp.where(fresh, fresh_margins, slots.margins + length * margins),
            gradient=gradient,
            step=jnp.where(fresh, 0, length * direction),
            steps=steps,
            changes=changes,
            # No way down: the memory is at fault, so it starts afresh.
            rho=jnp.where(finished | (length[:, 0, 0] == 0), 0, rho),
        )
        return trip + 1, taken + finished.sum(), slots, fit

    problem = queue[:num_slots]
    params, margins = jax.vmap(start)(problem)
    zeros, ring = jnp.zeros_like(params), jnp.zeros((_HISTORY, *params.shape))
    slots = _Slots(
        problem=problem,
        iterations=jnp.zeros(num_slots, int),
        params=params,
        margins=margins,
        gradient=zeros,
        step=zeros,
        steps=ring,
        changes=ring,
        rho=ring[:, :, 0, 0],
    )
    fit = (
        jnp.zeros((num_problems, num_classes, rows)),
        jnp.zeros(num_problems),
        jnp.zeros(num_problems),
        jnp.zeros(num_problems, int),
        jnp.zeros(num_problems, bool),
    )
    carry = (0, num_slots, slots, fit)
    return jax.lax.while_loop(lambda c: jnp.any(c[2].problem < num_problems), iterate, carry)[3]


def _margins(design, onehot, params):
    logits = params @ design.T
    return logits - jnp.sum(logits * onehot, 0)


def _evaluate(design, onehot, weight, penalty, params, margins):
    """The objective, its gradient, and the mean of p (1 - p) for each class, ``[c, 1]``."""
    top = jnp.max(margins, 0)  # at least 0, the margin of the own class
    exponential = jnp.exp(margins - top) * (1 - onehot)
    others = jnp.sum(exponential, 0)
    # 1 - p of the own class is a sum of small numbers, not a difference of large ones: at a weak L2
    # all that is left of the objective is far below the rounding of p.
    loss = top + jnp.log1p(others + jnp.expm1(-top))
    residual = (exponential - onehot * others) / (others + jnp.exp(-top))
    curvature = (jnp.abs(residual) * (1 - jnp.abs(residual))) @ weight
    objective = weight @ loss + jnp.vdot(penalty * params, params) / 2
    gradient = (residual * weight) @ design + penalty * params
    return objective, gradient, jnp.maximum(curvature, _ABSENT)[:, None]


def _direction(gradient, steps, changes, rho, inverse_hessian, newest):
    """Minus the L-BFGS inverse Hessian times the gradient; the ring's last entry is ``newest``."""
    order = (newest - jnp.arange(_HISTORY)) % _HISTORY

    def subtract(vector, i):
        alpha = rho[i] * jnp.vdot(steps[i], vector)
        return vector - alpha * changes[i], alpha

    def add(vector, i_alpha):
        i, alpha = i_alpha
        return vector + (alpha - rho[i] * jnp.vdot(changes[i], vector)) * steps[i], None

    vector, alphas = jax.lax.scan(subtract, gradient, order)
    # The initial matrix is right up to a factor, which the newest pair measures.
    scale = rho[newest] * jnp.vdot(changes[newest], inverse_hessian * changes[newest])
    vector = inverse_hessian * vector / jnp.where(scale > 0, scale, 1)
    vector, _ = jax.lax.scan(add, vector, (order, alphas), reverse=True)
    return -vector


def _line_search(weight, penalty, params, margins, direction, margin_direction, initial_slope):
    """Step length at which the slope has fallen to a tenth: Newton's method, kept in a bracket."""
    slope_penalty = jnp.vdot(penalty * direction, params)
    curvature_penalty = jnp.vdot(penalty * direction, direction)

    def derivatives(length):
        probabilities = jax.nn.softmax(margins + length * margin_direction, axis=0)
        mean = jnp.sum(probabilities * margin_direction, 0)
        variance = jnp.sum(probabilities * margin_direction**2, 0) - mean**2
        slope = weight @ mean + slope_penalty + length * curvature_penalty
        return slope, weight @ variance + curvature_penalty

    def refine(state):
        trial, length, low, high, slope, curvature = state
        low, high = jnp.where(slope < 0, length, low), jnp.where(slope < 0, high, length)
        newton = jnp.minimum(length - slope / curvature, 10 * length)
        middle = jnp.where(jnp.isinf(high), 10 * length, (low + high) / 2)
        length = jnp.where((low < newton) & (newton < high), newton, middle)
        return trial + 1, length, low, high, *derivatives(length)

    state = (0, 1.0, 0.0, jnp.inf, *derivatives(1.0))
    state = jax.lax.while_loop(
        lambda s: (s[0] < 10) & (jnp.abs(s[4]) > 0.1 * jnp.abs(initial_slope)), refine, state
    )
    # A trial that the loop gave up on may overshoot by far; the low end of the bracket never does.
    # Rounding alone can make the slope of a descent direction positive: then stay.
    settled = jnp.abs(state[4]) <= 0.1 * jnp.abs(initial_slope)
    return jnp.where(initial_slope < 0, jnp.where(settled, state[1], state[2]), 0)
