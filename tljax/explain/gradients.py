"""Attribution by gradients of a logit with respect to the image.

Each method is a pure function of ``logits_fn`` and of a batch. The map of an image does not depend
on the other images of its batch. Wrapped in `jax.jit`, with the variables as an argument, it
compiles once:

    @jax.jit
    def explain(variables, images, labels):
        logits_fn = lambda x: tljax.apply(model, variables, x).logits
        return integrated_gradients(logits_fn, images, labels).sum(-1)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

Images = Float[Array, "batch height width channels"]
Labels = Integer[Array, " batch"]

LogitsFn = Callable[[jax.Array], jax.Array]
"""Maps images ``[batch, height, width, channels]`` in [0, 1] to logits ``[batch, classes]``."""


def as_images(images: Images) -> jax.Array:
    """Convert images to a JAX array.

    Raises:
        RequestError: the images are not floating point, so no gradient exists.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise RequestError(f"images are {images.dtype}; pass floating point in [0, 1], as x / 255")
    return jnp.asarray(images)


def class_score(logits_fn: LogitsFn, labels: Labels) -> Callable[[jax.Array], jax.Array]:
    """Return a function that computes the logit of one given class for each image.

    Compose ``logits_fn`` with `jax.nn.log_softmax` or `jax.nn.softmax` to explain a probability.

    Args:
        logits_fn: maps images to ``[batch, classes]``.
        labels: ``[batch]`` integers, the class whose logit is returned for each image.

    Returns:
        A function from images ``[batch, ...]`` to ``[batch]`` values. It raises a `RequestError` if
        the number of images differs from the number of labels.
    """
    labels = jnp.asarray(labels)

    def score(images: jax.Array) -> jax.Array:
        if labels.shape != (len(images),):
            raise RequestError(
                f"labels have shape {labels.shape} for {len(images)} images; pass one for each"
            )
        return jnp.take_along_axis(logits_fn(images), labels[:, None], axis=1)[:, 0]

    return score


def input_gradient(
    logits_fn: LogitsFn, images: Images, labels: Labels
) -> Float[jax.Array, "batch height width channels"]:
    """Compute the gradient of each image's logit with respect to that image.

    Args:
        logits_fn: see `LogitsFn`. The logits of an image must not depend on other images of the
            batch, as they do with batch norm in training mode.
        images: ``[batch, height, width, channels]`` floating point in [0, 1].
        labels: ``[batch]`` integers, the class whose logit is explained for each image.

    Returns:
        ``[batch, height, width, channels]``, change of the logit per unit of pixel value (black to
        white).

    Raises:
        RequestError: the images are not floating point, or there is not one label per image.
    """
    score = class_score(logits_fn, labels)
    return jax.grad(lambda x: score(x).sum())(as_images(images))


def saliency(
    logits_fn: LogitsFn, images: Images, labels: Labels
) -> Float[jax.Array, "batch height width"]:
    """Compute the largest absolute gradient over the channels of each pixel.

    Source: Simonyan, Vedaldi and Zisserman, "Deep inside convolutional networks: visualising image
    classification models and saliency maps", 2014 (arXiv 1312.6034).

    Args:
        logits_fn: maps images to logits; see `input_gradient`.
        images: ``[batch, height, width, channels]`` floating point in [0, 1].
        labels: ``[batch]`` integers, the class whose logit is explained for each image.

    Returns:
        ``[batch, height, width]``, at least 0.
    """
    return jnp.abs(input_gradient(logits_fn, images, labels)).max(-1)


def smooth_grad(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    key: jax.Array,
    *,
    noise_level: float = 0.15,
    num_samples: int = 50,
) -> Float[jax.Array, "batch height width"]:
    """Compute the saliency of the mean gradient over noisy copies (SmoothGrad).

    All images of a batch get the same noise, each scaled by its own range of values. The map of an
    image is therefore the same in any batch.

    Source: Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017 (arXiv 1706.03825).

    Args:
        logits_fn: maps images to logits; see `input_gradient`.
        images: ``[batch, height, width, channels]`` floating point in [0, 1].
        labels: ``[batch]`` integers, the class whose logit is explained for each image.
        key: random key of the noise.
        noise_level: standard deviation of the noise, as a fraction of the image's range (largest
            minus smallest value). The paper recommends 0.1 to 0.2; 0 gives `saliency`.
        num_samples: number of noisy copies to average. Only one of them is in memory at a time.

    Returns:
        ``[batch, height, width]``, at least 0.
    """
    images = as_images(images)
    value_range = images.max((1, 2, 3), keepdims=True) - images.min((1, 2, 3), keepdims=True)

    def accumulate(total: jax.Array, sample: jax.Array) -> tuple[jax.Array, None]:
        noise = jax.random.normal(jax.random.fold_in(key, sample), images.shape[1:], images.dtype)
        noisy = images + noise_level * value_range * noise
        return total + input_gradient(logits_fn, noisy, labels), None

    total, _ = jax.lax.scan(accumulate, jnp.zeros_like(images), jnp.arange(num_samples))
    return jnp.abs(total / num_samples).max(-1)


def integrated_gradients(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    *,
    baselines: Array | float = 0.0,
    num_steps: int = 50,
) -> Float[jax.Array, "batch height width channels"]:
    """Attribute the difference between the logits of an image and of a baseline to its pixels.

    The attribution is the mean gradient along the straight path from the baseline to the image,
    times the difference between image and baseline. The mean is computed by Gauss-Legendre
    quadrature: for a smooth network the attributions of an image sum to the difference of the two
    logits up to rounding (completeness).

    Source: Sundararajan, Taly and Yan, "Axiomatic attribution for deep networks", 2017
    (arXiv 1703.01365).

    Args:
        logits_fn: maps images to logits; see `input_gradient`.
        images: ``[batch, height, width, channels]`` floating point in [0, 1].
        labels: ``[batch]`` integers, the class whose logit is explained for each image.
        baselines: images without information, of any shape that broadcasts to the images; by
            default black.
        num_steps: number of points on the path. Only one gradient per image is in memory at a time.

    Returns:
        ``[batch, height, width, channels]``, signed, in units of the logit.
    """
    images = as_images(images)
    baselines = jnp.broadcast_to(jnp.asarray(baselines, images.dtype), images.shape)
    nodes, weights = np.polynomial.legendre.leggauss(num_steps)  # on [-1, 1]
    path = jnp.asarray((nodes + 1) / 2, images.dtype), jnp.asarray(weights / 2, images.dtype)

    def accumulate(total: jax.Array, node: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        position, weight = node
        interpolated = baselines + position * (images - baselines)
        return total + weight * input_gradient(logits_fn, interpolated, labels), None

    mean, _ = jax.lax.scan(accumulate, jnp.zeros_like(images), path)
    return mean * (images - baselines)
