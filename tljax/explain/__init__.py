"""Explanations of a network's outputs (saliency maps, Grad-CAM) and feature visualization.

Pure functions of ``logits_fn(images) -> logits``, or of the two halves of a network. They depend on
nothing else in tljax and work with any JAX model.
"""

from tljax.explain.dream import deep_dream as deep_dream
from tljax.explain.dream import mean_square as mean_square
from tljax.explain.gradients import class_score as class_score
from tljax.explain.gradients import input_gradient as input_gradient
from tljax.explain.gradients import integrated_gradients as integrated_gradients
from tljax.explain.gradients import saliency as saliency
from tljax.explain.gradients import smooth_grad as smooth_grad
from tljax.explain.parametrization import FOURIER as FOURIER
from tljax.explain.parametrization import PIXELS as PIXELS
from tljax.explain.parametrization import Parametrization as Parametrization
from tljax.explain.pictures import as_rgb as as_rgb
from tljax.explain.pictures import channel_pictures as channel_pictures
from tljax.explain.pictures import heatmap as heatmap
from tljax.explain.pictures import overlay as overlay
from tljax.explain.pictures import scale_maps as scale_maps
from tljax.explain.pictures import strongest_channels as strongest_channels
from tljax.explain.pictures import to_pixels as to_pixels
from tljax.explain.regions import grad_cam as grad_cam
from tljax.explain.regions import occlusion as occlusion
from tljax.explain.transforms import DEFAULT_TRANSFORMS as DEFAULT_TRANSFORMS
from tljax.explain.transforms import NO_TRANSFORMS as NO_TRANSFORMS
from tljax.explain.transforms import Transforms as Transforms
from tljax.explain.visualize import Objective as Objective
from tljax.explain.visualize import channel_mean as channel_mean
from tljax.explain.visualize import total_variation as total_variation
from tljax.explain.visualize import visualize as visualize
