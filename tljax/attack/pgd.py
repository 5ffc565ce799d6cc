"""Projected gradient descent and its relatives: one loop of step, projection, clipping."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import (
    Found,
    LogitsFn,
    along,
    as_array,
    best_of,
    compiled,
    fold_in,
    one_each,
    prepare,
)
from tljax.attack.losses import Loss, ascent, goal
from tljax.attack.norms import NORMS, Bounds, into_ball, norm_of
from tljax.runtime.types import Array


@compiled
def pgd(
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
    num_steps: int = 40,
    step_size: Array | float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    momentum: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Projected gradient descent: the last iterate, of one start or of the best of several.

        logits_fn = lambda images: apply(model, variables, images).logits
        adversarial = pgd(logits_fn, images, labels, jax.random.key(0), epsilon=8 / 255)

    Each step goes along the steepest ascent of the loss (the gradient's sign for Linf, the unit
    gradient for L2, its largest entries for L1), then back into the ball around the image, then
    into the bounds.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018
    (arXiv 1706.06083).

    Args:
        logits_fn: images to logits; it alone knows the network and its preprocessing. Keep one
            function object for all calls: each new one is compiled. For a large network better
            ``jax.tree_util.Partial(function, variables)``: `tljax.attack.contract.LogitsFn`.
        images: ``[n, height, width, 3]``, or ``[n, ...]``, floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: random key. The same key gives the same adversarial images.
        epsilon: radius of the ball in the units of the images (8 / 255 for images in [0, 1]); one
            number, or ``[n]``. Other values compile nothing. 0 returns the images.
        ids: ``[n]`` int, whatever names an example; its random numbers depend on it and on the key
            alone. By default a hash of each image's values.
        targets: ``[n]`` int, the classes wanted instead; by default any but the label.
        norm: "linf", "l2" or "l1".
        loss: "ce", "dlr", "margin", or a function like them (see `tljax.attack.losses`).
        num_steps: number of gradients, of each restart.
        step_size: like epsilon; by default 2.5 * epsilon / num_steps, as Madry et al. have it.
        random_start: whether to start uniformly in the ball rather than at the image.
        restarts: how many starts; the first that fools the network, else that of the highest loss.
        momentum: decay of the accumulated gradients (see `mi_fgsm`); by default none.
        bounds: smallest and largest value of a pixel.

    Returns:
        Images of the same shape and type, at most epsilon away (to float32 rounding; exactly, where
        they have 16 bits), within the bounds.

    Raises:
        RequestError: an argument has the wrong shape or type, an unknown name, or (where `jax.jit`
            does not trace it) a value out of its range.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    ball, aim = norm_of(norm, NORMS), goal(loss, labels, targets)
    default = 2.5 * epsilon / num_steps
    step = default if step_size is None else one_each(step_size, images, "step_size")
    project = partial(into_ball, images=images, epsilon=epsilon, norm=ball, bounds=bounds)

    def run(keys: jax.Array) -> jax.Array:
        def body(_, state):
            x, velocity = state
            gradient = ascent(logits_fn, aim.objective, x).gradient
            if momentum is not None:
                mean = jnp.mean(jnp.abs(gradient), axis=range(1, gradient.ndim))
                tiny = jnp.finfo(gradient.dtype).tiny  # a gradient of 0 stays one
                gradient = momentum * velocity + gradient / along(jnp.maximum(mean, tiny), x)
            return project(x + along(step, x) * ball.steepest(gradient)), gradient

        start = images
        if random_start:
            start = project(images + along(epsilon, images) * ball.inside(keys, images.shape[1:]))
        return lax.fori_loop(0, num_steps, body, (start, jnp.zeros_like(images)))[0]

    def judge(x: jax.Array) -> Found:
        end = ascent(logits_fn, aim.objective, x)  # nothing uses its gradient: it is not computed
        return x, aim.reached(end.logits), end.loss

    if restarts == 1:
        return run(keys)
    return best_of(lambda number, _: judge(run(fold_in(keys, number))), restarts, images)[0]


def fgsm(
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
    random_start: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Fast gradient sign method: one step of `pgd` from the image, of length epsilon.

    ``random_start`` makes it the one of Wong et al., "Fast is better than free", 2020
    (arXiv 2001.03994), who step 1.25 epsilon.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples", 2015
    (arXiv 1412.6572). Arguments and errors are those of `pgd`; without a random start the key
    makes no difference.
    """
    return pgd(
        logits_fn,
        images,
        labels,
        key,
        epsilon=epsilon,
        ids=ids,
        targets=targets,
        norm=norm,
        loss=loss,
        num_steps=1,
        step_size=as_array(epsilon, "epsilon") * (1.25 if random_start else 1.0),
        random_start=random_start,
        bounds=bounds,
    )


def bim(
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
    num_steps: int = 10,
    step_size: Array | float | None = None,
    momentum: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Basic iterative method: `pgd` that starts at the image; the key makes no difference.

    Source: Kurakin et al., "Adversarial examples in the physical world", 2017 (arXiv 1607.02533).
    Arguments and errors are those of `pgd`.
    """
    return pgd(
        logits_fn,
        images,
        labels,
        key,
        epsilon=epsilon,
        ids=ids,
        targets=targets,
        norm=norm,
        loss=loss,
        num_steps=num_steps,
        step_size=step_size,
        random_start=False,
        momentum=momentum,
        bounds=bounds,
    )


def mi_fgsm(
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
    num_steps: int = 10,
    step_size: Array | float | None = None,
    momentum: float = 1.0,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Momentum iterative method: `bim` along accumulated gradients, which transfer better.

    The velocity is ``momentum * velocity + gradient / mean(abs(gradient))``. The default step is
    epsilon / num_steps.

    Source: Dong et al., "Boosting adversarial attacks with momentum", 2018 (arXiv 1710.06081).
    Arguments and errors are those of `pgd`; the key makes no difference.
    """
    return bim(
        logits_fn,
        images,
        labels,
        key,
        epsilon=epsilon,
        ids=ids,
        targets=targets,
        norm=norm,
        loss=loss,
        num_steps=num_steps,
        step_size=as_array(epsilon, "epsilon") / num_steps if step_size is None else step_size,
        momentum=momentum,
        bounds=bounds,
    )
