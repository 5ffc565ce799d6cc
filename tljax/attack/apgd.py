"""Auto-PGD (APGD): projected gradient descent with an adaptive step size."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tljax.attack.contract import Result, best_of, choose, compiled, expand_like, fold_in, prepare
from tljax.attack.losses import (
    Goal,
    Loss,
    LossAndGradient,
    loss_and_gradient,
    make_goal,
    mean_logits,
    top_other_classes,
)
from tljax.attack.norms import get_norm, project_to_ball
from tljax.attack.types import (
    Bounds,
    DeviceImages,
    Images,
    LabelMatrix,
    Labels,
    LogitsFn,
    PerExample,
)

_RHO = 0.75  # the step is halved if the loss rose in at most this fraction of a window's steps
_STEP_WEIGHT = 0.75  # weight of the new step; the rest is the previous update


class _State(NamedTuple):
    """State of the loop; every field is ``[batch, ...]``.

    Attributes:
        x, x_eval: the current iterate, and its loss, gradient and logits.
        loss: loss of the last step, which is not that of ``x`` after a return to the best iterate.
        previous: the previous iterate.
        best_x, best: the iterate of the highest loss, and its loss, gradient and logits.
        fooled, adversarial: whether an iterate succeeded, and the last one that did.
        step_size: the current step size.
        increases: number of steps of this window in which the loss increased.
        halved: whether the step size was halved at the last checkpoint.
        checkpoint_loss: the highest loss at the last checkpoint.
    """

    x: jax.Array
    x_eval: LossAndGradient
    loss: jax.Array
    previous: jax.Array
    best_x: jax.Array
    best: LossAndGradient
    fooled: jax.Array
    adversarial: jax.Array
    step_size: jax.Array
    increases: jax.Array
    halved: jax.Array
    checkpoint_loss: jax.Array


def checkpoints(num_steps: int) -> np.ndarray:
    """Return ``[num_steps]`` integers: the length of the window that ends at a step, else 0.

    The first window has 22% of the steps; each following one is shorter by 3% of the steps, down to
    6%.
    """
    window, shortest, shorter = (max(int(part * num_steps), 1) for part in (0.22, 0.06, 0.03))
    ends, end = np.zeros(num_steps, np.int32), window
    while end <= num_steps:
        ends[end - 1] = window
        window = max(window - shorter, shortest)
        end += window
    return ends


def _run(
    logits_fn: LogitsFn,
    images: jax.Array,
    epsilon: jax.Array,
    keys: jax.Array,
    done: jax.Array,
    *,
    goal: Goal,
    norm: str,
    num_steps: int,
    stop_early: bool,
    bounds: Bounds,
) -> Result:
    """Run APGD from one random start; examples in ``done`` have succeeded before."""
    ball, windows = get_norm(norm), jnp.asarray([0, *checkpoints(num_steps)])
    project = partial(project_to_ball, images=images, epsilon=epsilon, norm=ball, bounds=bounds)

    start = project(images + expand_like(epsilon, images) * ball.surface(keys, images.shape[1:]))

    def active(state: _State) -> jax.Array:
        return ~(state.fooled | done) if stop_early else jnp.ones_like(done)

    def step(number: jax.Array, state: _State) -> _State:
        """Take step ``number``; 0 only evaluates the start."""
        x, x_eval, first = state.x, state.x_eval, number == 0
        z = project(x + expand_like(state.step_size, x) * ball.steepest(x_eval.gradient))
        new = project(x + _STEP_WEIGHT * (z - x) + (1 - _STEP_WEIGHT) * (x - state.previous))
        new = jnp.where(number == 1, z, jnp.where(first, start, new))
        new_eval = loss_and_gradient(logits_fn, goal.objective, new)
        reached = goal.reached(new_eval.logits)
        better = first | (new_eval.loss > state.best.loss)
        best_x, best = choose(better, (new, new_eval), (state.best_x, state.best))

        checkpoint = windows[number] > 0
        increases = state.increases + ((new_eval.loss > state.loss) & (number > 0))
        stuck = ~state.halved & (best.loss <= state.checkpoint_loss)
        halve = checkpoint & ((increases <= _RHO * windows[number]) | stuck)
        x, x_eval = choose(halve, (best_x, best), (new, new_eval))
        return _State(
            x=x,
            x_eval=x_eval,
            loss=new_eval.loss,
            previous=state.x,
            best_x=best_x,
            best=best,
            fooled=state.fooled | reached,
            adversarial=choose(reached, new, state.adversarial),
            step_size=jnp.where(halve, state.step_size / 2, state.step_size),
            increases=jnp.where(checkpoint, 0, increases),
            halved=jnp.where(checkpoint, halve, state.halved),
            checkpoint_loss=jnp.where(checkpoint | first, best.loss, state.checkpoint_loss),
        )

    def body(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        number, state = carry
        # An example that is done no longer changes, so its result does not depend on the batch.
        return number + 1, choose(active(state), step(number, state), state)

    empty = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(partial(loss_and_gradient, logits_fn, goal.objective), images),
    )
    state = _State(
        x=start,
        x_eval=empty,
        loss=empty.loss,
        previous=start,
        best_x=start,
        best=empty,
        fooled=jnp.zeros_like(done),
        adversarial=start,
        step_size=2 * epsilon,
        increases=jnp.zeros(len(images), jnp.int32),
        halved=jnp.ones_like(done),
        checkpoint_loss=empty.loss,
    )
    _, end = lax.while_loop(
        lambda carry: (carry[0] <= num_steps) & active(carry[1]).any(), body, (jnp.int32(0), state)
    )
    return choose(end.fooled, end.adversarial, end.best_x), end.fooled, end.best.loss


@compiled
def apgd(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels | LabelMatrix,
    key: jax.Array,
    *,
    epsilon: PerExample,
    ids: Labels | None = None,
    targets: Labels | LabelMatrix | None = None,
    norm: str = "linf",
    loss: str | Loss = "ce",
    num_steps: int = 100,
    restarts: int = 1,
    stop_early: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Run Auto-PGD (APGD), which starts with step size 2 * epsilon and halves it on stalls.

        adversarial = apgd(logits_fn, images, labels, key, epsilon=8 / 255, loss="dlr")

    Each step is projected twice and includes a quarter of the previous update. At checkpoints the
    step size is halved and the search continues from the best iterate if the loss increased in at
    most 75% of the steps since the last checkpoint, or if the best loss did not improve with this
    step size.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", 2020 (arXiv 2003.01690), algorithm 1.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        images: ``[batch, height, width, 3]`` or any ``[batch, ...]``, floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes; several labels as in `tljax.attack.pgd.pgd`.
        key: random key.
        epsilon: radius of the ball in the units of the images, one number or ``[batch]``.
        ids: ``[batch]`` integers that identify the examples (see `tljax.attack.pgd.pgd`).
        targets: ``[batch]`` integers, the classes to be predicted; by default any but the label.
        norm: "linf" or "l2".
        loss: "ce", "dlr" (needs 3 classes, 4 with targets), "margin", or a function; "bce" for
            several labels per image.
        num_steps: number of gradient steps per restart, not counting the gradient at the start.
        restarts: number of random restarts. For each example the first success is returned, or the
            result with the highest loss.
        stop_early: return the first iterate that fools the network instead of the last, and stop
            when all examples are fooled. The success rate is the same.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        The last iterate that fools the network, or the one with the highest loss if none does.

    Raises:
        RequestError: an argument has the wrong shape or dtype, an unknown name, or a value out of
            range.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    goal = make_goal(loss, labels, targets)
    run = partial(
        _run, logits_fn, images, epsilon,
        goal=goal, norm=norm, num_steps=num_steps, stop_early=stop_early, bounds=bounds,
    )  # fmt: skip

    return best_of(lambda number, done: run(fold_in(keys, number), done), restarts, images)[0]


@compiled
def apgd_t(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    key: jax.Array,
    *,
    epsilon: PerExample,
    ids: Labels | None = None,
    norm: str = "linf",
    loss: str | Loss = "dlr",
    num_steps: int = 100,
    num_targets: int = 9,
    stop_early: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Run targeted Auto-PGD (APGD-T) towards the most probable other classes, one after another.

    Any prediction other than the label is a success.

    Source: Croce and Hein, 2020 (arXiv 2003.01690); see `apgd`.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        images: ``[batch, height, width, 3]`` or any ``[batch, ...]``, floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes.
        key: random key.
        epsilon: radius of the ball in the units of the images, one number or ``[batch]``.
        ids: ``[batch]`` integers that identify the examples (see `tljax.attack.pgd.pgd`).
        norm: "linf" or "l2".
        loss: "dlr" (needs 4 classes), "margin", "ce", or a function.
        num_steps: number of gradient steps per target.
        num_targets: number of target classes, the most probable ones on the original image.
        stop_early: return the first iterate that fools the network and stop when all examples are
            fooled.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        An image that fools the network, or the one with the highest loss if none does.

    Raises:
        RequestError: an argument has the wrong shape or dtype, an unknown name, or a value out of
            range.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    ranked = top_other_classes(mean_logits(logits_fn, images), labels, num_targets)

    def run(rank: jax.Array, done: jax.Array) -> Result:
        targeted, untargeted = make_goal(loss, labels, ranked[:, rank]), make_goal(loss, labels)
        goal = Goal(targeted.objective, untargeted.reached)
        return _run(
            logits_fn, images, epsilon, fold_in(keys, rank), done,
            goal=goal, norm=norm, num_steps=num_steps, stop_early=stop_early, bounds=bounds,
        )  # fmt: skip

    return best_of(run, ranked.shape[1], images)[0]
