"""Outputs of stages as feature maps, wherever a network has them: of maps, and of tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tljax.models.model import Model, abstract_outputs, abstract_variables, apply
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array, FeatureMap, Variables


def spatial_stages(model: Model) -> tuple[str, ...]:
    """Return the stages whose output is a feature map or tokens of patches, in order.

    Raises:
        RequestError: the network has none.
    """
    if not model.spatial_stages:
        raise RequestError(f"no stage of {model.name} returns a feature map")
    return model.spatial_stages


def require_spatial(model: Model, stage: str) -> None:
    """Raise a `RequestError` if the output of a stage is no feature map, nor tokens of patches."""
    name = model.stages[model.position(stage)].name
    if name not in model.spatial_stages:
        options = ", ".join(model.spatial_stages) or "a network that has feature maps"
        raise RequestError(f"the output of {name} is not a feature map: choose from {options}")


def feature_map(
    model: Model, stage: str, output: Float[Array, "batch ..."], image_shape: Sequence[int]
) -> FeatureMap:
    """Return the output of a stage, or a gradient of its shape, as a feature map.

    Tokens of patches are arranged in rows and columns, and those before them are left out.

    Args:
        model: model that the stage belongs to.
        stage: name of the stage.
        output: ``[batch, height, width, channels]``, returned as it is, or
            ``[batch, tokens, channels]``.
        image_shape: shape ``[batch, height, width, channels]`` of the images, of any size.

    Returns:
        ``[batch, h, w, channels]``.

    Raises:
        RequestError: the model has no such stage, its output is a vector, or there is not one token
            for each patch.
    """
    name, _, kind, prefix, patch = model.stages[model.position(stage)]
    if kind == "map":
        return jnp.asarray(output)
    require_spatial(model, stage)
    rows, columns = image_shape[1] // patch, image_shape[2] // patch
    if output.ndim != 3 or output.shape[1] != prefix + rows * columns:
        raise RequestError(
            f"the output of {name} has shape {list(output.shape)}: images of {image_shape[1]} x "
            f"{image_shape[2]} pixels have {prefix} + {rows} x {columns} tokens"
        )
    return jnp.asarray(output)[:, prefix:].reshape(len(output), rows, columns, -1)


def grad_cam_stage(model: Model) -> str:
    """Return the last stage whose feature map reaches the head, which Grad-CAM explains.

    It is the last map before the pooling, if this reads the whole map. If it reads the class token
    alone, the patches have no influence after the last attention, so their gradient would be zero:
    it is then the stage before the last block, whose output is what this attention reads.

    Raises:
        RequestError: no stage of the model returns a feature map.
    """
    stages = spatial_stages(model)
    if stages[-1] in model.map_stages:
        return stages[-1]
    variables = abstract_variables(model)
    outputs = abstract_outputs(model, variables, stages)
    for stage in reversed(stages):
        if _reaches_head(model, variables, stage, outputs[stage]):
            return stage
    raise RequestError(f"no feature map of {model.name} has an influence on its outputs")


def _reaches_head(
    model: Model, shapes: Variables, stage: str, output: jax.ShapeDtypeStruct
) -> bool:
    """Return True if the head's input depends on the patches: not-a-number passes through zeros."""
    start = model.position(stage) + 1
    later = model.stage_names[start:]
    variables = {
        kind: {name: tree for name, tree in stages.items() if name in later}
        for kind, stages in shapes.items()
    }
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    x = np.zeros(output.shape, output.dtype)
    x[:, model.stages[start - 1].prefix_tokens :] = np.nan
    with jax.debug_nans(False):
        run = jax.jit(lambda v, x: jnp.isnan(apply(model, v, x, start=start, stop=-1).value).any())
        return bool(run(variables, x))
