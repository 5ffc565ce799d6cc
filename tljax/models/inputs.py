"""Networks for images of other channels than those they were trained on."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from tljax.models.model import Model, abstract_variables
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Array, Variables

_RGB = Preprocess()


def adapt_input(
    model: Model, variables: Variables, preprocess: Preprocess
) -> tuple[Model, Variables]:
    """Adapt a network to images of other channels, or of another mean and standard deviation.

    The first kernel is summed or repeated, see `adapt_kernel`. A network of Caffe, which expects
    BGR values in [0, 255] minus the mean, first becomes one that expects RGB values divided by the
    standard deviation of ImageNet: its kernel is reversed and scaled.

    Args:
        model: a network.
        variables: its variables; not modified.
        preprocess: new preprocessing, whose mean and standard deviation are those of the images.

    Returns:
        The network with this preprocessing, in the order of channels of the images, and variables.

    Raises:
        RequestError: the first stage of the network has no kernel over the channels of images.
    """
    path, old = input_kernel(model), model.preprocess
    flat = dict(flatten(variables["params"]))
    kernel = np.asarray(flat[path])
    if old.channel_order == "bgr":
        scale = np.asarray(_RGB.std) / np.asarray(old.std)
        kernel = (kernel[..., ::-1, :] * scale[:, None]).astype(kernel.dtype)
    flat[path] = adapt_kernel(kernel, preprocess.channels)
    model = replace(model, preprocess=replace(preprocess, channel_order="rgb"))
    return model, {**variables, "params": unflatten(flat)}


def adapt_kernel(
    kernel: Float[Array, "*window channels outputs"], channels: int
) -> Float[np.ndarray, "*window new_channels outputs"]:
    """Adapt a kernel to another number of input channels.

    One channel gets the sum over the old channels, as if a gray image were repeated. More channels
    repeat the old ones in turn, scaled so that equal channels keep the sum. This is what timm does
    to a kernel of three channels.

    Args:
        kernel: ``[..., channels, outputs]``.
        channels: new number of input channels.
    """
    kernel = np.asarray(kernel)
    old = kernel.shape[-2]
    if channels == old:
        return kernel
    if channels == 1:
        return kernel.sum(axis=-2, keepdims=True)
    scale = np.asarray(old / channels, kernel.dtype)
    return kernel[..., np.arange(channels) % old, :] * scale


def input_kernel(model: Model) -> str:
    """Return the path of the kernel that reads the channels of images.

    Raises:
        RequestError: there is no such kernel in the first stage, or several.
    """
    stage = model.stages[0].name
    first = replace(
        model,
        stages=model.stages[:1],  # the other stages take long
        preprocess=replace(_RGB, size=model.preprocess.size),
    )
    shapes = flatten(abstract_variables(first)["params"].get(stage, {}))
    paths = [
        path
        for path, leaf in shapes.items()
        if path.endswith("kernel") and len(leaf.shape) == 4 and leaf.shape[-2] == 3
    ]
    if len(paths) != 1:
        raise RequestError(
            f"{stage} of {model.name} has {len(paths)} kernels over three channels instead of one: "
            "leave out the number of channels"
        )
    return f"{stage}/{paths[0]}"
