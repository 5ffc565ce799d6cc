"""What a network looks at, and what it has in mind: explanations and pictures.

Pure functions over ``logits_fn(images) -> logits`` or over the halves of a network. They know
nothing of the rest of tljax and work with any JAX model.
"""

from tljax.explain.dream import deep_dream, mean_square
from tljax.explain.gradients import (
    input_gradient,
    integrated_gradients,
    saliency,
    score_of,
    smooth_grad,
)
from tljax.explain.parametrization import FOURIER, PIXELS, Parametrization
from tljax.explain.pictures import (
    channel_pictures,
    heatmap,
    overlay,
    scale_maps,
    strongest_channels,
    to_pixels,
)
from tljax.explain.regions import grad_cam, occlusion
from tljax.explain.transforms import MOVING, STILL, Transforms
from tljax.explain.visualize import Objective, channel_mean, total_variation, visualize

__all__ = [
    "FOURIER",
    "MOVING",
    "PIXELS",
    "STILL",
    "Objective",
    "Parametrization",
    "Transforms",
    "channel_mean",
    "channel_pictures",
    "deep_dream",
    "grad_cam",
    "heatmap",
    "input_gradient",
    "integrated_gradients",
    "mean_square",
    "occlusion",
    "overlay",
    "saliency",
    "scale_maps",
    "score_of",
    "smooth_grad",
    "strongest_channels",
    "to_pixels",
    "total_variation",
    "visualize",
]
