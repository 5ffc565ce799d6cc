"""Comparison of the graph in a whole Keras model with the network that tljax builds.

`keras_graphs.json` holds the graphs of `keras.applications` as lists of `Step`. Settings that the
shapes of the tensors determine (widths, kernel sizes) or that do not affect the output are left
out.
"""

import json
import re
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import Any, NamedTuple, get_args

import numpy as np

from tljax.models import Model, build_model
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind

# Layer settings that the tensors determine or that do not affect the output.
_IGNORED_SETTINGS = re.compile(
    r"name|trainable|dtype|autocast|filters|units|use_bias|scale|momentum|renorm_\w+|synchronized"
    r"|fused|keepdims|groups|init_values|projection_dim|(batch_)?(input_)?shape|\w+_(initializer|regularizer|constraint)"
)
# Other settings with their default values, which a step does not mention.
_DEFAULTS = {
    "activation": ("linear",),
    "axis": (-1, 3),
    "center": (True,),
    "data_format": ("channels_last",),
    "depth_multiplier": (1,),
    "dilation_rate": (1,),
    "mask": (None,),
    "max_value": (None,),
    "negative_slope": (0,),
    "padding": ("valid",),
    "quantization_config": (None,),
    "renorm": (False,),
    "rms_scaling": (False,),
    "strides": (1,),
    "threshold": (0,),
    "training": (False, None),
}
# Layers that do nothing in evaluation, or change only shapes, which the tensors determine.
_IDENTITIES = re.compile(
    r"Activation|Flatten|Reshape|Identity|StochasticDepth|ActivityRegularization|Random\w+"
    r"|(Spatial|Gaussian|Alpha)?(Dropout|Noise)(2D)?"
)
_SYNONYMS = {
    "ReLU": "relu",
    "swish": "silu",  # the name in Keras 2
    "ReLU(max_value=6)": "relu6",
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
}
_POOL = "GlobalAveragePooling2D"
_WORKAROUND = (
    "tljax does not support that; a file of weights alone (Keras' save_weights) is loaded as the "
    "network of keras.applications"
)


Statistics = tuple[Any, Any]
"""Mean and variance, each a number or ``[channels]``."""


class Step(NamedTuple):
    """One operation of a graph.

    Attributes:
        operation: for example ``Conv2D(padding='same', strides=2)``, ``relu6`` or ``Add``.
        inputs: offsets back to the steps whose outputs it takes; an offset to before the first step
            stands for the image.
        layer: name of the layer in the file.
    """

    operation: str
    inputs: tuple[int, ...]
    layer: str


class _Layer(NamedTuple):
    """A layer in the file.

    Attributes:
        name: its name, with the names of the models that contain it as a prefix.
        kind: its Keras class.
        config: its settings and the keyword arguments of its call.
        inputs: names of the layers whose outputs it takes.
        numbers: constants that it takes beside them.
    """

    name: str
    kind: str
    config: dict[str, Any]
    inputs: list[str]
    numbers: list[float]


class _Value(NamedTuple):
    """The output of a layer.

    Attributes:
        step: index of the step that computes it; -1 for the image.
        size: height and width; None where unknown.
        padding: a ZeroPadding2D layer that is still to be applied, if any.
    """

    step: int
    size: tuple[int | None, ...]
    padding: _Layer | None = None


class Graph:
    """The operations of a Keras model in topological order.

    Attributes:
        steps: see `Step`.
        size: height and width of the image in pixels; None where any size is accepted.
        scaling: factor and offset that the graph first applies to an image in [0, 255].
    """

    def __init__(
        self, config: dict[str, Any], *, same: bool, statistics: Statistics | None = None
    ) -> None:
        """Parse the configuration of a model.

        Args:
            config: ``class_name``, and ``config`` as `keras.Model.get_config` returns it.
            same: treat a ZeroPadding2D layer that pads like SAME as part of the convolution.
            statistics: weights of the Normalization layer, if it has weights.
        """
        self._same, self._statistics = same, statistics
        self.steps: list[Step] = []
        self.size: tuple[int | None, ...] = (None, None)
        self.scaling: tuple[Any, Any] = (1.0, 0.0)
        layers, output = _layers(config)
        values: dict[str, _Value] = {}
        waiting = [output]
        while waiting:
            layer = layers[waiting[-1]]
            if missing := [name for name in layer.inputs if name not in values]:
                waiting.append(missing[0])
                if len(waiting) > len(layers):
                    raise ValueError("a layer takes its own output")
            else:
                values[waiting.pop()] = self._compute(layer, [values[x] for x in layer.inputs])

    @property
    def scales_pixels(self) -> bool:
        """Return True if the graph begins with layers that scale the image."""
        factor, offset = self.scaling
        return bool(np.any(factor != 1) or np.any(offset != 0))

    def _compute(self, layer: _Layer, inputs: list[_Value]) -> _Value:
        """Append the steps of a layer, given the outputs that it takes."""
        name, kind, config, _, numbers = layer
        if kind == "InputLayer":
            self.size = tuple((config.get("batch_shape") or config["batch_input_shape"])[1:3])
            return _Value(-1, self.size)
        if kind == "Normalization":
            scaling = _normalized(self.scaling, config, self._statistics)
        else:
            scaling = _scaled(self.scaling, layer)
        if not self.steps and scaling:
            self.scaling = scaling
            return inputs[0]
        size, padding = inputs[0].size, inputs[0].padding
        if kind == "ZeroPadding2D" and not padding:
            return inputs[0]._replace(padding=layer)
        if kind in ("Conv2D", "DepthwiseConv2D"):
            if _simplify(config["kernel_size"]) == 1:  # nothing to pad
                config = config | {"padding": "valid"}
            elif self._same and padding and _pads_like_same(padding, size, config):
                config, inputs = config | {"padding": "same"}, [_Value(inputs[0].step, size)]
        inputs = list(map(self._padded, inputs))
        size = tuple(n and -(-n // _simplify(config.get("strides", 1))) for n in size)
        value = inputs[0]
        if not _IDENTITIES.fullmatch(kind) or (config.get("training") and "Random" not in kind):
            value = self._step(_describe(kind, config, numbers), inputs, name)
        if (activation := _activation_name(config.get("activation"))) != "linear":
            value = self._step(activation, [value], name)
        return value._replace(size=size)

    def _padded(self, value: _Value) -> _Value:
        if not (padding := value.padding):
            return value
        return self._step(_describe(padding.kind, padding.config, []), [value], padding.name)

    def _step(self, operation: str, inputs: list[_Value], layer: str) -> _Value:
        index = len(self.steps)
        offsets = tuple(index - value.step for value in inputs)
        self.steps.append(Step(_SYNONYMS.get(operation, operation), offsets, layer))
        return _Value(index, inputs[0].size)


def _layers(
    model: dict[str, Any], prefix: str = "", model_inputs: list[str] | None = None
) -> tuple[dict[str, _Layer], str]:
    """Return the layers by name, and the name of the one whose output is the model's.

    Args:
        model: a model. The layers of models inside it are listed among its own.
        prefix: prefix for the names of its layers.
        model_inputs: names of the layers whose outputs a model inside another one takes.
    """
    graph = model["config"]
    items = graph["layers"] if isinstance(graph, dict) else graph  # a list in old Sequential models
    layers: dict[str, _Layer] = {}
    sequential = model["class_name"] == "Sequential"
    name, previous = "", model_inputs
    for item in items:
        config, kind = item["config"], item["class_name"]
        name, options = prefix + str(item.get("name") or config["name"]), {}
        if kind == "InputLayer":
            args = model_inputs or []
            if model_inputs is not None:
                config, kind = {}, "Identity"
        elif sequential:
            if previous is None:  # an old Sequential model without an InputLayer
                previous = [f"input of {name}"]
                layers[previous[0]] = _Layer(previous[0], "InputLayer", config, [], [])
            args = previous
        else:
            args, options = _call(item["inbound_nodes"])
            args = [prefix + arg if isinstance(arg, str) else arg for arg in args]
        inputs = [arg for arg in args if isinstance(arg, str)]
        if kind in ("Functional", "Model", "Sequential"):
            inner, output = _layers(item, f"{name}/", inputs)
            layers |= inner
            config, kind, args, inputs = {}, "Identity", [output], [output]
        numbers: list[Any] = args[len(inputs) :]
        layers[name] = _Layer(name, kind, {**config, **options}, inputs, numbers)
        previous = [name]
    if not sequential:
        [name] = [prefix + out for out in _flatten(graph["output_layers"]) if isinstance(out, str)]
    return layers, name


def _call(nodes: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a layer's call (names of layers and numbers) and its keywords."""
    if not nodes:
        return [], {}
    [node] = nodes  # no supported network uses a layer twice
    if isinstance(node, dict):  # Keras 3
        return _flatten(node["args"]), node["kwargs"]
    return [arg[0] for arg in node], {key: v for arg in node for key, v in dict(*arg[3:]).items()}


def _flatten(args: Any) -> list[Any]:
    """Flatten nested lists of arguments, and replace tensors by the names of their layers."""
    if isinstance(args, dict):
        return [args["config"]["keras_history"][0]]
    return [x for arg in args for x in _flatten(arg)] if isinstance(args, list) else [args]


def _describe(kind: str, config: dict[str, Any], numbers: list[float]) -> str:
    """Return the class of a layer, with its constants and all settings that are not defaults."""
    arguments = [f"{number:.6g}" for number in numbers]
    for key, value in sorted(config.items()):
        # An activation is a step of its own.
        ignored = key == "activation" or _IGNORED_SETTINGS.fullmatch(key)
        ignored = ignored or (key == "kernel_size" and kind.endswith(("Conv1D", "Conv2D")))
        if not ignored and (simple := _simplify(value)) not in _DEFAULTS.get(key, ()):
            arguments.append(f"{key}={simple!r}")
    return f"{kind}({', '.join(arguments)})" if arguments else kind


def _activation_name(activation: Any) -> str:
    """Return the name of an activation, which a file gives as a name, a function or a layer."""
    if not isinstance(activation, dict):
        return activation or "linear"
    config = activation["config"]
    return config if isinstance(config, str) else _describe(activation["class_name"], config, [])


def _simplify(value: Any) -> Any:
    """Return ``[2, 2]`` as 2, and ``6.0`` as 6."""
    if isinstance(value, list | tuple):
        values = tuple(map(_simplify, value))
        return values[0] if values and values.count(values[0]) == len(values) else values
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pads_like_same(padding: _Layer, size: tuple[int | None, ...], config: dict[str, Any]) -> bool:
    """Return whether a layer pads like a SAME convolution; unknown sizes count as even."""
    kernel, stride = _simplify(config["kernel_size"]), _simplify(config["strides"])
    sides = []
    for n in (side or 2 * stride * kernel for side in size):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides.append((total // 2, total - total // 2))
    return _simplify(sides) == _simplify(padding.config["padding"])


def _normalized(
    scaling: tuple[Any, Any], config: dict[str, Any], statistics: Statistics | None
) -> tuple[Any, Any] | None:
    """Return the same after a Normalization layer, whose statistics are settings or weights."""
    if config.get("mean") is not None:
        statistics = config["mean"], config["variance"]
    if statistics is None or config.get("invert"):
        return None
    (factor, offset), (mean, variance) = scaling, (np.ravel(np.float64(x)) for x in statistics)
    std = np.sqrt(variance)
    return factor / std, (offset - mean) / std


def _scaled(scaling: tuple[Any, Any], layer: _Layer) -> tuple[Any, Any] | None:
    """Return the factor and offset of the image after a layer; None if it does anything else."""
    match layer.kind, layer.numbers:
        case "Rescaling", []:
            factor, offset = (np.float64(layer.config[key]) for key in ("scale", "offset"))
        case "Normalization", [] if layer.config.get("mean") and not layer.config.get("invert"):
            mean, variance = (np.float64(layer.config[key]) for key in ("mean", "variance"))
            factor, offset = 1 / np.sqrt(variance), -mean / np.sqrt(variance)
        case "TrueDivide" | "Divide", [number]:
            factor, offset = 1 / number, 0.0
        case "Multiply", [number]:
            factor, offset = number, 0.0
        case "Subtract", [number]:
            factor, offset = 1.0, -number
        case "Add", [number]:
            factor, offset = 1.0, number
        case _:
            return None
    return scaling[0] * factor, scaling[1] * factor + offset


def read_graph(
    text: str, where: str, model: Model, statistics: Statistics | None = None
) -> tuple[Model, bool, tuple[Kind, ...]]:
    """Compare the graph in a file with that of a network, and take over its preprocessing.

    Args:
        text: configuration of a Keras model, JSON.
        where: name of the file, for error messages.
        model: the network that the tensors of the file fit.
        statistics: mean and variance of its Normalization layer, if the file has such weights.

    Returns:
        The network with the image size and pixel scaling of the graph; whether the graph scales the
        pixels; and the kinds of tasks that its last activation allows, the one to assume first.

    Raises:
        RequestError: the graph computes something else; the message names the layer.
    """
    try:
        same = model.name.startswith("tf_")
        graph = Graph(json.loads(text), same=same, statistics=statistics)
        reason = _difference(graph.steps, model)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{where}: its graph cannot be parsed ({error!r:.80}); {_WORKAROUND}"
        ) from error
    if reason:
        raise RequestError(f"{where}: {reason}; {_WORKAROUND}")
    preprocess = model.preprocess
    height, width = graph.size
    if height == width and isinstance(height, int):
        preprocess = preprocess.with_size(height)
    if graph.scales_pixels:
        factor, offset = (np.broadcast_to(x, preprocess.channels).tolist() for x in graph.scaling)
        preprocess = replace(
            preprocess,
            mean=tuple(-b / a / 255 for a, b in zip(factor, offset, strict=True)),
            std=tuple(1 / a / 255 for a in factor),
            channel_order="rgb",
        )
    kinds = _kinds(graph.steps[-1].operation, model.num_classes)
    return replace(model, preprocess=preprocess), graph.scales_pixels, kinds


def _kinds(activation: str, outputs: int) -> tuple[Kind, ...]:
    """Return the kinds of tasks whose outputs end in an activation, the one to assume first."""
    if activation == "softmax":
        return ("classification",)
    if activation == "sigmoid":
        one_of_two: tuple[Kind, ...] = ("classification",) if outputs == 1 else ()
        return (*one_of_two, "multilabel", "ordinal")
    return get_args(Kind)


def _difference(steps: list[Step], model: Model) -> str:
    """Return the first difference to the graph that tljax builds; empty if there is none."""
    name, count, last = model.name, model.num_classes, ""
    if steps and steps[-1].operation in ("softmax", "sigmoid"):
        *steps, (last, _, _) = steps
    expected = _graphs()[re.sub(r"_\d{3}$", "", name)]
    operations = [step.operation for step in expected]
    pools = [i for i, operation in enumerate(operations) if operation == _POOL]
    top = pools[-1] if pools else operations.index("Dense")
    has_hidden = len(model.stages) == len(build_model(name).stages)
    if not has_hidden or [step.operation for step in steps[top:]] in ([_POOL], [_POOL, "Dense"]):
        expected = [*expected[:top], Step(_POOL, (1,), ""), Step("Dense", (1,), "")]
    for step, reference in zip_longest(steps, expected):
        if step is None:
            # The tensors have shown already that a missing head is allowed.
            headless = reference.operation in (_POOL, "Dense", "Conv2D")
            if not headless:
                return f"its output is that of {steps[-1].layer!r:.80}"
            break
        layer = f"layer {step.layer!r:.80}"
        if reference is None or step.operation != reference.operation:
            rest = f"has {reference.operation}" if reference else "ends before it"
            return f"{layer} is {step.operation:.200}, but {name} {rest}"
        if step.inputs != reference.inputs:
            return f"{layer} has other inputs than in {name}"
    if last == "softmax" and count == 1:
        return "its single output ends in a softmax, which is always 1"
    if last and not count:
        return f"its features end in a {last}"
    return ""


@cache
def _graphs() -> dict[str, list[Step]]:
    """Return the supported graphs by the name of a network without its width."""
    table = json.loads(files("tljax.pretrained").joinpath("keras_graphs.json").read_text("utf-8"))
    kinds = [Step(operation, tuple(inputs), "") for operation, *inputs in table["steps"]]
    return {name: [kinds[i] for i in graph] for name, graph in table["graphs"].items()}
