"""Auto-PGD: projected gradient descent that chooses its step size by itself."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tljax.attack.contract import (
    Found,
    LogitsFn,
    along,
    best_of,
    choose,
    compiled,
    fold_in,
    prepare,
)
from tljax.attack.losses import Ascent, Goal, Loss, ascent, best_others, goal, mean_logits
from tljax.attack.norms import Bounds, into_ball, norm_of
from tljax.runtime.types import Array

_RHO = 0.75  # a window in which the loss rose less often than this halves the step
_INERTIA = 0.75  # weight of the new step; the rest is the last movement


class _Climb(NamedTuple):
    """What the loop carries; everything is ``[n, ...]``.

    Attributes:
        x, at: where to step from, and the loss, gradient and logits there.
        loss: of the last step; not of ``at`` after a return to the best point.
        previous: the iterate before.
        best_x, best: the iterate of the highest loss.
        fooled, adversarial: whether an iterate reached the goal, and the last one that did.
        size: step size.
        rises: in how many steps of this window the loss rose.
        halved: whether the step was halved at the last checkpoint.
        checked: the highest loss at the last checkpoint.
    """

    x: jax.Array
    at: Ascent
    loss: jax.Array
    previous: jax.Array
    best_x: jax.Array
    best: Ascent
    fooled: jax.Array
    adversarial: jax.Array
    size: jax.Array
    rises: jax.Array
    halved: jax.Array
    checked: jax.Array


def checkpoints(num_steps: int) -> np.ndarray:
    """``[num_steps]`` int: the length of the window that ends with a step, 0 where none ends.

    The first window is 22% of the steps, each next one 3% shorter, down to 6%.
    """
    window, shortest, shorter = (max(int(part * num_steps), 1) for part in (0.22, 0.06, 0.03))
    ends, end = np.zeros(num_steps, np.int32), window
    while end <= num_steps:
        ends[end - 1] = window
        window = max(window - shorter, shortest)
        end += window
    return ends


def _climb(
    logits_fn: LogitsFn,
    images: jax.Array,
    epsilon: jax.Array,
    keys: jax.Array,
    done: jax.Array,
    *,
    aim: Goal,
    norm: str,
    num_steps: int,
    stop_early: bool,
    bounds: Bounds,
) -> Found:
    """One start: the images found, whether they reach the goal, and the highest loss met."""
    ball, windows = norm_of(norm), jnp.asarray([0, *checkpoints(num_steps)])
    project = partial(into_ball, images=images, epsilon=epsilon, norm=ball, bounds=bounds)

    start = project(images + along(epsilon, images) * ball.surface(keys, images.shape[1:]))

    def working(state: _Climb) -> jax.Array:
        return ~(state.fooled | done) if stop_early else jnp.ones_like(done)

    def step(number: jax.Array, state: _Climb) -> _Climb:
        """Number 0 only looks at the start, 1 takes the first step."""
        x, at = state.x, state.at
        z = project(x + along(state.size, x) * ball.steepest(at.gradient))
        new = project(x + _INERTIA * (z - x) + (1 - _INERTIA) * (x - state.previous))
        new = jnp.where(number == 1, z, jnp.where(number == 0, start, new))
        there = ascent(logits_fn, aim.objective, new)
        reached = aim.reached(there.logits)
        better = (number == 0) | (there.loss > state.best.loss)
        best_x, best = choose(better, (new, there), (state.best_x, state.best))

        checkpoint = windows[number] > 0
        rises = state.rises + ((there.loss > state.loss) & (number > 0))
        stuck = ~state.halved & (best.loss <= state.checked)
        halve = checkpoint & ((rises <= _RHO * windows[number]) | stuck)
        x, at = choose(halve, (best_x, best), (new, there))
        return _Climb(
            x=x,
            at=at,
            loss=there.loss,
            previous=state.x,
            best_x=best_x,
            best=best,
            fooled=state.fooled | reached,
            adversarial=choose(reached, new, state.adversarial),
            size=jnp.where(halve, state.size / 2, state.size),
            rises=jnp.where(checkpoint, 0, rises),
            halved=jnp.where(checkpoint, halve, state.halved),
            checked=jnp.where(checkpoint | (number == 0), best.loss, state.checked),
        )

    def body(carry: tuple[jax.Array, _Climb]) -> tuple[jax.Array, _Climb]:
        number, state = carry
        # Who is done stays as he is, so that his neighbours make no difference.
        return number + 1, choose(working(state), step(number, state), state)

    nowhere = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(partial(ascent, logits_fn, aim.objective), images),
    )
    state = _Climb(
        x=start,
        at=nowhere,
        loss=nowhere.loss,
        previous=start,
        best_x=start,
        best=nowhere,
        fooled=jnp.zeros_like(done),
        adversarial=start,
        size=2 * epsilon,
        rises=jnp.zeros(len(images), jnp.int32),
        halved=jnp.ones_like(done),
        checked=nowhere.loss,
    )
    _, end = lax.while_loop(
        lambda carry: (carry[0] <= num_steps) & working(carry[1]).any(), body, (jnp.int32(0), state)
    )
    return choose(end.fooled, end.adversarial, end.best_x), end.fooled, end.best.loss


@compiled
def apgd(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    epsilon: Array | float,
    ids: Array | None = None,
    targets: Array | None = None,
    norm: str = "linf",
    loss: str | Loss = "ce",
    num_steps: int = 100,
    restarts: int = 1,
    stop_early: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Auto-PGD: no step size to choose. It begins with 2 * epsilon and halves when progress stalls.

        adversarial = apgd(logits_fn, images, labels, key, epsilon=8 / 255, loss="dlr")

    Each step is projected twice and keeps a quarter of the last movement. At checkpoints the step
    is halved, and the search goes on from the best point, if the loss rose in no more than 75% of
    the steps since the last one, or if the best loss has not improved with this step size.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", 2020 (arXiv 2003.01690), algorithm 1.

    Args:
        logits_fn: images to logits.
        images: ``[n, height, width, 3]``, or ``[n, ...]``, floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: random key.
        epsilon: radius of the ball in the units of the images; one number, or ``[n]``.
        ids: ``[n]`` int names of the examples (see `tljax.attack.pgd.pgd`).
        targets: ``[n]`` int, the classes wanted instead; by default any but the label.
        norm: "linf" or "l2".
        loss: "ce", "dlr" (3 classes at least, 4 with targets), "margin", or a function.
        num_steps: number of gradients after the first, of each restart.
        restarts: how many starts; one that fools the network, else that of the highest loss.
        stop_early: to return the first iterate that fools the network rather than the last, and to
            stop when all have been found: as often fooled, sooner.
        bounds: smallest and largest value of a pixel.

    Returns:
        The last iterate that fools the network, or where none does that of the highest loss.

    Raises:
        RequestError: an argument has the wrong shape or type, or an unknown name.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    aim = goal(loss, labels, targets)
    run = partial(
        _climb, logits_fn, images, epsilon,
        aim=aim, norm=norm, num_steps=num_steps, stop_early=stop_early, bounds=bounds,
    )  # fmt: skip

    return best_of(lambda number, done: run(fold_in(keys, number), done), restarts, images)[0]


@compiled
def apgd_t(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    epsilon: Array | float,
    ids: Array | None = None,
    norm: str = "linf",
    loss: str | Loss = "dlr",
    num_steps: int = 100,
    num_targets: int = 9,
    stop_early: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Auto-PGD towards each of the best other classes in turn, until any mistake is made.

    APGD-T of Croce and Hein (see `apgd`, whose arguments and errors these are), with the targeted
    DLR loss.

    Args:
        logits_fn: images to logits.
        images: ``[n, ...]``.
        labels: ``[n]``.
        key: random key.
        epsilon: one number, or ``[n]``.
        ids: ``[n]``.
        norm: "linf" or "l2".
        loss: "dlr" needs 4 classes; "margin" does with 2.
        num_steps: number of gradients, for each target.
        num_targets: number of classes, counted from the most probable on the image itself.
        stop_early: whether the first mistake ends the search.
        bounds: smallest and largest value of a pixel.

    Returns:
        An image that fools the network, or where none was found that of the highest loss.

    Raises:
        RequestError: as `apgd`.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    ranked = best_others(mean_logits(logits_fn, images), labels, num_targets)

    def run(rank: jax.Array, done: jax.Array) -> Found:
        targets = ranked[:, rank]
        aim = Goal(goal(loss, labels, targets).objective, goal(loss, labels).reached)
        return _climb(
            logits_fn, images, epsilon, fold_in(keys, rank), done,
            aim=aim, norm=norm, num_steps=num_steps, stop_early=stop_early, bounds=bounds,
        )  # fmt: skip

    return best_of(run, ranked.shape[1], images)[0]
