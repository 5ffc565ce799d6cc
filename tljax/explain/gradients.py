"""Which pixels does a logit depend on? Gradients with respect to the image, read in three ways.

Each is a pure function over ``logits_fn``, for batches. What a picture gets does not depend on the
others of its batch. Wrapped in `jax.jit`, with the variables as an argument, it compiles once:

    @jax.jit
    def explain(variables, images, labels):
        logits_fn = lambda x: tljax.apply(model, variables, x).logits
        return integrated_gradients(logits_fn, images, labels).sum(-1)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

LogitsFn = Callable[[jax.Array], jax.Array]
"""``[batch, height, width, channels]`` images in [0, 1] to ``[batch, classes]`` logits."""


def as_images(images: Array) -> jax.Array:
    """The images on the device.

    Raises:
        RequestError: they are not floating point: nothing could be differentiated, and a value in
            [0, 1] would mean something else.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise RequestError(f"images are {images.dtype}; pass floating point in [0, 1], as x / 255")
    return jnp.asarray(images)


def score_of(logits_fn: LogitsFn, labels: Array) -> Callable[[jax.Array], jax.Array]:
    """One number for each image: the logit of its class.

    Compose ``logits_fn`` with `jax.nn.log_softmax` or `jax.nn.softmax` to explain a probability.

    Args:
        logits_fn: images to ``[batch, classes]``.
        labels: ``[batch]`` integers, the class that each image is asked about.

    Returns:
        A function of images, ``[batch, ...]`` to ``[batch]``.

    Raises:
        RequestError: when called, on another number of images than labels.
    """
    labels = jnp.asarray(labels)

    def score(images: jax.Array) -> jax.Array:
        if labels.shape != (len(images),):
            raise RequestError(
                f"labels have shape {labels.shape} for {len(images)} images; pass one for each"
            )
        return jnp.take_along_axis(logits_fn(images), labels[:, None], axis=1)[:, 0]

    return score


def input_gradient(logits_fn: LogitsFn, images: Array, labels: Array) -> jax.Array:
    """The gradient of each image's logit with respect to that image.

    Args:
        logits_fn: see `LogitsFn`. Its images must not mix, as batch norm in training mode does.
        images: ``[batch, height, width, channels]`` floating point, [0, 1].
        labels: ``[batch]`` integers, the class that each image is asked about.

    Returns:
        ``[batch, height, width, channels]``, in logits for a whole step from black to white.

    Raises:
        RequestError: images that are not floating point, or another number of labels.
    """
    score = score_of(logits_fn, labels)
    return jax.grad(lambda x: score(x).sum())(as_images(images))


def saliency(logits_fn: LogitsFn, images: Array, labels: Array) -> jax.Array:
    """How strongly the logit answers to each pixel (Simonyan, Vedaldi and Zisserman 2014).

    Args:
        logits_fn: see `input_gradient`.
        images: ``[batch, height, width, channels]`` floating point, [0, 1].
        labels: ``[batch]`` integers, the class that each image is asked about.

    Returns:
        ``[batch, height, width]``, at least 0: the largest absolute gradient of the channels.
    """
    return jnp.abs(input_gradient(logits_fn, images, labels)).max(-1)


def smooth_grad(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    noise_level: float = 0.15,
    num_samples: int = 50,
) -> jax.Array:
    """The saliency of the gradient averaged over noisy copies (Smilkov et al. 2017, SmoothGrad).

    Every image of the batch is given the same draws, scaled by its own range of values, so that its
    map is that which it would get alone.

    Args:
        logits_fn: see `input_gradient`.
        images: ``[batch, height, width, channels]`` floating point, [0, 1].
        labels: ``[batch]`` integers, the class that each image is asked about.
        key: of the noise.
        noise_level: standard deviation of the noise, in units of the image's own range (largest
            minus smallest value); the paper recommends 0.1 to 0.2. With 0 this is `saliency`.
        num_samples: noisy copies that are averaged; only one of them is in memory at a time.

    Returns:
        ``[batch, height, width]``, at least 0.
    """
    images = as_images(images)
    spread = images.max((1, 2, 3), keepdims=True) - images.min((1, 2, 3), keepdims=True)

    def accumulate(total: jax.Array, sample: jax.Array) -> tuple[jax.Array, None]:
        noise = jax.random.normal(jax.random.fold_in(key, sample), images.shape[1:], images.dtype)
        noisy = images + noise_level * spread * noise
        return total + input_gradient(logits_fn, noisy, labels), None

    total, _ = jax.lax.scan(accumulate, jnp.zeros_like(images), jnp.arange(num_samples))
    return jnp.abs(total / num_samples).max(-1)


def integrated_gradients(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    baselines: Array | float = 0.0,
    num_steps: int = 50,
) -> jax.Array:
    """Each value's share in the rise of the logit above that of a baseline.

    The gradient's mean along the straight way from the baseline to the image, times that way
    (Sundararajan, Taly and Yan 2017). The integral is Gauss and Legendre's: on a smooth network the
    shares of an image sum to the difference of the two logits to rounding (completeness).

    Args:
        logits_fn: see `input_gradient`.
        images: ``[batch, height, width, channels]`` floating point, [0, 1].
        labels: ``[batch]`` integers, the class that each image is asked about.
        baselines: what counts as nothing, of any shape that broadcasts to the images; black.
        num_steps: gradients per image; only one of them is in memory at a time.

    Returns:
        ``[batch, height, width, channels]``, in logits, of both signs.
    """
    images = as_images(images)
    baselines = jnp.broadcast_to(jnp.asarray(baselines, images.dtype), images.shape)
    nodes, weights = np.polynomial.legendre.leggauss(num_steps)  # on [-1, 1]
    path = jnp.asarray((nodes + 1) / 2, images.dtype), jnp.asarray(weights / 2, images.dtype)

    def accumulate(total: jax.Array, node: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        position, weight = node
        between = baselines + position * (images - baselines)
        return total + weight * input_gradient(logits_fn, between, labels), None

    mean, _ = jax.lax.scan(accumulate, jnp.zeros_like(images), path)
    return mean * (images - baselines)
