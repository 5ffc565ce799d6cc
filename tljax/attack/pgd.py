"""Projected gradient descent (PGD), FGSM, BIM and MI-FGSM."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import (
    Result,
    as_array,
    best_of,
    compiled,
    expand_like,
    fold_in,
    per_example,
    prepare,
)
from tljax.attack.losses import Loss, loss_and_gradient, make_goal
from tljax.attack.norms import NORMS, get_norm, project_to_ball
from tljax.attack.types import (
    Bounds,
    DeviceImages,
    Images,
    LabelMatrix,
    Labels,
    LogitsFn,
    PerExample,
)


@compiled
def pgd(
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
    num_steps: int = 40,
    step_size: PerExample | None = None,
    random_start: bool = True,
    restarts: int = 1,
    momentum: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Maximize a loss by projected gradient descent (PGD) within a ball around each image.

        logits_fn = lambda images: apply(model, variables, images).logits
        adversarial = pgd(logits_fn, images, labels, jax.random.key(0), epsilon=8 / 255)

    Each step moves in the direction of steepest ascent (the sign of the gradient for Linf, the unit
    gradient for L2, its largest entries for L1), is projected onto the ball around the image, and
    is clipped to the bounds.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018
    (arXiv 1706.06083).

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``, preprocessing
            included. Use the same function object in all calls, because each new one is compiled;
            for large networks use ``jax.tree_util.Partial(function, variables)`` (see
            `tljax.attack.types.LogitsFn`).
        images: ``[batch, height, width, 3]`` or any ``[batch, ...]``, floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes; with ``loss="bce"`` ``[batch, labels]`` of
            0, 1 and NaN, which is unknown.
        key: random key. The same key gives the same adversarial images.
        epsilon: radius of the ball in the units of the images (such as 8 / 255 for images in
            [0, 1]), one number or ``[batch]``. 0 returns the images. New values do not trigger
            compilation.
        ids: ``[batch]`` integers that identify the examples. The random numbers of an example
            depend only on its id and on the key. The default is a hash of the image.
        targets: ``[batch]`` integers, the classes to be predicted; by default any but the label.
            With ``loss="bce"`` ``[batch, labels]``: 1 for a label to be predicted, 0 for one not to
            be, NaN for one that may be either.
        norm: "linf", "l2" or "l1".
        loss: "ce", "dlr", "margin", or a function with the same signature (see
            `tljax.attack.losses`); "bce" for a network with several labels per image, whose logits
            are those of a sigmoid each.
        num_steps: number of gradient steps per restart.
        step_size: step size in the units of epsilon, one number or ``[batch]``. The default is
            2.5 * epsilon / num_steps, as in Madry et al.
        random_start: start at a uniformly random point of the ball instead of at the image.
        restarts: number of random restarts. For each example the first success is returned, or the
            result with the highest loss.
        momentum: decay of the accumulated gradients (see `mi_fgsm`); by default no momentum.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        The last iterate: images of the same shape and dtype, within the bounds and at most epsilon
        away (up to float32 rounding; exactly for 16-bit images).

    Raises:
        RequestError: an argument has the wrong shape or dtype, an unknown name, or a value out of
            range (values traced by `jax.jit` are not checked).
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    ball, goal = get_norm(norm, NORMS), make_goal(loss, labels, targets)
    default = 2.5 * epsilon / num_steps
    step = default if step_size is None else per_example(step_size, images, "step_size")
    project = partial(project_to_ball, images=images, epsilon=epsilon, norm=ball, bounds=bounds)

    def run(keys: jax.Array) -> jax.Array:
        def body(_, state):
            x, velocity = state
            gradient = loss_and_gradient(logits_fn, goal.objective, x).gradient
            if momentum is not None:
                mean = jnp.mean(jnp.abs(gradient), axis=range(1, gradient.ndim))
                tiny = jnp.finfo(gradient.dtype).tiny  # a gradient of 0 stays 0
                gradient = momentum * velocity + gradient / expand_like(jnp.maximum(mean, tiny), x)
            return project(x + expand_like(step, x) * ball.steepest(gradient)), gradient

        start = images
        if random_start:
            start = project(
                images + expand_like(epsilon, images) * ball.inside(keys, images.shape[1:])
            )
        return lax.fori_loop(0, num_steps, body, (start, jnp.zeros_like(images)))[0]

    def rate(x: jax.Array) -> Result:
        end = loss_and_gradient(logits_fn, goal.objective, x)  # jit drops the unused gradient
        return x, goal.reached(end.logits), end.loss

    if restarts == 1:
        return run(keys)
    return best_of(lambda number, _: rate(run(fold_in(keys, number))), restarts, images)[0]


def fgsm(
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
    random_start: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Take one step of length epsilon from the image: the fast gradient sign method (FGSM).

    With ``random_start`` the step starts at a random point of the ball and has length 1.25 epsilon,
    as in Wong et al., "Fast is better than free", 2020 (arXiv 2001.03994).

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples", 2015
    (arXiv 1412.6572). Arguments and errors are those of `pgd`. Without a random start the key is
    unused.
    """
    step_size = as_array(epsilon, "epsilon") * (1.25 if random_start else 1.0)
    options: Any = {"ids": ids, "targets": targets, "norm": norm, "loss": loss, "bounds": bounds}
    options |= {"num_steps": 1, "step_size": step_size, "random_start": random_start}
    return pgd(logits_fn, images, labels, key, epsilon=epsilon, **options)


def bim(
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
    num_steps: int = 10,
    step_size: PerExample | None = None,
    momentum: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Run `pgd` from the image itself: the basic iterative method (BIM, I-FGSM).

    Source: Kurakin et al., "Adversarial examples in the physical world", 2017 (arXiv 1607.02533).
    Arguments and errors are those of `pgd`. The key is unused.
    """
    options: Any = {"ids": ids, "targets": targets, "norm": norm, "loss": loss, "bounds": bounds}
    options |= {"num_steps": num_steps, "step_size": step_size, "momentum": momentum}
    return pgd(logits_fn, images, labels, key, epsilon=epsilon, random_start=False, **options)


def mi_fgsm(
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
    num_steps: int = 10,
    step_size: PerExample | None = None,
    momentum: float = 1.0,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Run `bim` with momentum: the momentum iterative method (MI-FGSM), which transfers better.

    The velocity is ``momentum * velocity + gradient / mean(abs(gradient))``. The default step size
    is epsilon / num_steps.

    Source: Dong et al., "Boosting adversarial attacks with momentum", 2018 (arXiv 1710.06081).
    Arguments and errors are those of `pgd`. The key is unused.
    """
    step_size = as_array(epsilon, "epsilon") / num_steps if step_size is None else step_size
    options: Any = {"ids": ids, "targets": targets, "norm": norm, "loss": loss, "bounds": bounds}
    options |= {"num_steps": num_steps, "step_size": step_size, "momentum": momentum}
    return bim(logits_fn, images, labels, key, epsilon=epsilon, **options)
