"""Which regions does a logit depend on? Grad-CAM reads a feature map, occlusion covers parts."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tljax.explain.gradients import LogitsFn, as_images, input_gradient, score_of
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array


def grad_cam(
    features_fn: Callable[[jax.Array], jax.Array],
    logits_from_features_fn: Callable[[jax.Array], jax.Array],
    images: Array,
    labels: Array,
) -> jax.Array:
    """Where a late feature map speaks for the class (Selvaraju et al. 2017, Grad-CAM).

    ``relu(sum_c w_c A_c)`` for the channels ``A_c`` of the map, where ``w_c`` is the mean over all
    positions of the logit's gradient with respect to ``A_c``. The network comes in two halves:

        features_fn = lambda images: apply(model, variables, images, stop="pool").value
        logits_from_features_fn = lambda x: apply(model, variables, x, start="pool").logits

    Args:
        features_fn: images to a feature map ``[batch, h, w, channels]``.
        logits_from_features_fn: that map to ``[batch, classes]``.
        images: ``[batch, height, width, channels]`` floating point, [0, 1].
        labels: ``[batch]`` integers, the class that each image is asked about.

    Returns:
        ``[batch, h, w]``, at least 0; all zero where nothing speaks for the class. `heatmap` and
        `overlay` scale and enlarge it.

    Raises:
        RequestError: the features have no height and width.
    """
    features = features_fn(as_images(images))
    if features.ndim != 4:
        raise RequestError(
            f"Grad-CAM needs a feature map [batch, height, width, channels], not {features.shape}; "
            "cut the network before its pooling"
        )
    gradient = input_gradient(logits_from_features_fn, features, labels)
    weights = gradient.mean((1, 2), keepdims=True)
    return jax.nn.relu((weights * features).sum(-1))


def occlusion(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    window: int = 32,
    stride: int = 16,
    fill: Array | float = 0.5,
) -> jax.Array:
    """How far the logit falls when a square is covered (Zeiler and Fergus 2014).

    The square moves in equal steps until the whole image has been covered; the last one of a row
    or column may reach over the edge. It costs one forward pass of the batch for each place.

    Args:
        logits_fn: images to ``[batch, classes]``; need not be differentiable.
        images: ``[batch, height, width, channels]`` floating point, [0, 1].
        labels: ``[batch]`` integers, the class that each image is asked about.
        window: side of the square, in pixels.
        stride: step between two places, in pixels, at most ``window``.
        fill: what covers, in [0, 1]: one value, one a channel, or anything that broadcasts.

    Returns:
        ``[batch, height, width]``, in logits: each pixel's mean over the squares that cover it.

    Raises:
        RequestError: a stride that would leave pixels uncovered.
    """
    if not 1 <= stride <= window:
        raise RequestError(f"stride {stride} must lie between 1 and the window {window}")
    images = as_images(images)
    height, width = images.shape[1:3]
    score = score_of(logits_fn, labels)
    uncovered = score(images)
    corners = np.indices([math.ceil(max(n - window, 0) / stride) + 1 for n in (height, width)])
    y, x = jnp.arange(height)[:, None], jnp.arange(width)

    def cover(totals: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        top, left = corner * stride
        inside = (y >= top) & (y < top + window) & (x >= left) & (x < left + window)
        fall = uncovered - score(jnp.where(inside[..., None], fill, images))
        # The last row counts how often a pixel was covered.
        return totals + inside * jnp.append(fall, 1)[:, None, None], None

    totals = jnp.zeros((len(images) + 1, height, width), uncovered.dtype)
    totals, _ = jax.lax.scan(cover, totals, jnp.asarray(corners.reshape(2, -1).T))
    return totals[:-1] / totals[-1]
