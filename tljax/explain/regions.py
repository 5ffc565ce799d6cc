"""Attribution to image regions: Grad-CAM and occlusion."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tljax.explain.gradients import Images, Labels, LogitsFn, as_images, class_score, input_gradient
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array


def grad_cam(
    features_fn: Callable[[jax.Array], jax.Array],
    logits_from_features_fn: Callable[[jax.Array], jax.Array],
    images: Images,
    labels: Labels,
    *,
    as_map: Callable[[jax.Array], jax.Array] = lambda features: features,
) -> Float[jax.Array, "batch h w"]:
    """Compute Grad-CAM: the regions of a feature map that increase the logit of a class.

    The map is ``relu(sum_c w_c A_c)`` for the channels ``A_c`` of the feature map, where ``w_c`` is
    the mean over all positions of the gradient of the logit with respect to ``A_c``. The network is
    passed in two halves:

        features_fn = lambda images: apply(model, variables, images, stop="pool").value
        logits_from_features_fn = lambda x: apply(model, variables, x, start="pool").logits

    A Vision Transformer is split after a stage of tokens, which become a map by

        as_map = lambda tokens: feature_map(model, stage, tokens, images.shape)

    Source: Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based
    localization", 2017 (arXiv 1610.02391).

    Args:
        features_fn: maps images to a feature map ``[batch, h, w, channels]``, or to anything of
            which ``as_map`` makes one.
        logits_from_features_fn: maps the features to logits ``[batch, classes]``.
        images: ``[batch, height, width, channels]`` floating point in [0, 1].
        labels: ``[batch]`` integers, the class whose logit is explained for each image.
        as_map: arranges the features, and their gradient, as ``[batch, h, w, channels]``.

    Returns:
        ``[batch, h, w]``, at least 0; zero everywhere if no region increases the logit. `heatmap`
        and `overlay` scale and resize it.

    Raises:
        RequestError: the features are not a map with height and width.
    """
    features = features_fn(as_images(images))
    maps = as_map(features)
    if maps.ndim != 4:
        raise RequestError(
            f"Grad-CAM needs a feature map [batch, height, width, channels], not {maps.shape}: "
            "split the network before its global pooling, and pass as_map for tokens"
        )
    gradient = as_map(input_gradient(logits_from_features_fn, features, labels))
    weights = gradient.mean((1, 2), keepdims=True)
    return jax.nn.relu((weights * maps).sum(-1))


def occlusion(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    *,
    window: int = 32,
    stride: int = 16,
    fill: Array | float = 0.5,
) -> Float[jax.Array, "batch height width"]:
    """Measure the decrease of the logit when a square of the image is covered.

    The square moves on a grid that covers the whole image; the last squares of a row or column may
    extend beyond the edge. Each position costs one forward pass of the batch.

    Source: Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014
    (arXiv 1311.2901).

    Args:
        logits_fn: maps images to logits ``[batch, classes]``; need not be differentiable.
        images: ``[batch, height, width, channels]`` floating point in [0, 1].
        labels: ``[batch]`` integers, the class whose logit is explained for each image.
        window: side of the square, in pixels.
        stride: distance between neighboring positions, in pixels, from 1 to ``window``.
        fill: color of the square, in [0, 1]: one value, one per channel, or any array that
            broadcasts to the images. The default is gray.

    Returns:
        ``[batch, height, width]``, the mean decrease of the logit over the squares that cover a
        pixel.

    Raises:
        RequestError: ``stride`` is larger than ``window``, which would skip pixels, or less than 1.
    """
    if not 1 <= stride <= window:
        raise RequestError(f"stride {stride} must lie between 1 and the window {window}")
    images = as_images(images)
    height, width = images.shape[1:3]
    score = class_score(logits_fn, labels)
    uncovered = score(images)
    corners = np.indices([math.ceil(max(n - window, 0) / stride) + 1 for n in (height, width)])
    y, x = jnp.arange(height)[:, None], jnp.arange(width)

    def cover(totals: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        top, left = corner * stride
        inside = (y >= top) & (y < top + window) & (x >= left) & (x < left + window)
        decrease = uncovered - score(jnp.where(inside[..., None], fill, images))
        # The last row counts the squares that cover each pixel.
        return totals + inside * jnp.append(decrease, 1)[:, None, None], None

    totals = jnp.zeros((len(images) + 1, height, width), uncovered.dtype)
    totals, _ = jax.lax.scan(cover, totals, jnp.asarray(corners.reshape(2, -1).T))
    return totals[:-1] / totals[-1]
