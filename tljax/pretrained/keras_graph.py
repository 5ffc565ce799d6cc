"""What a whole model of Keras says of the graph between its weights: ours, or refused by name.

`keras_graphs.json` holds the graphs of `keras.applications` as `steps` writes them down: what the
tensors tell (widths, sizes of kernels) and what changes no answer is left out.
"""

import json
import re
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from tljax.models import Model, build_model
from tljax.runtime.errors import RequestError

# Of a layer's configuration: what the tensors tell or changes no answer, and the usual values.
_HARMLESS = re.compile(
    r"name|trainable|dtype|autocast|filters|units|use_bias|scale|momentum|renorm_\w+|synchronized"
    r"|fused|keepdims|(batch_)?(input_)?shape|\w+_(initializer|regularizer|constraint)"
)
_USUAL = {
    "activation": ("linear",),
    "axis": (-1, 3),
    "center": (True,),
    "data_format": ("channels_last",),
    "depth_multiplier": (1,),
    "dilation_rate": (1,),
    "groups": (1,),
    "mask": (None,),
    "max_value": (None,),
    "negative_slope": (0,),
    "padding": ("valid",),
    "quantization_config": (None,),
    "renorm": (False,),
    "strides": (1,),
    "threshold": (0,),
    "training": (False, None),
}
# What changes nothing in evaluation, and what changes shapes alone, which the tensors tell.
_IDLE = re.compile(
    r"Activation|Flatten|Reshape|Identity|ActivityRegularization|Random\w+"
    r"|(Spatial|Gaussian|Alpha)?(Dropout|Noise)(2D)?"
)
_SYNONYMS = {"ReLU": "relu", "ReLU(max_value=6)": "relu6", "Softmax": "softmax"}
_POOL = "GlobalAveragePooling2D"
_WAY_AROUND = (
    "tljax does not build that; weights alone (Keras' save_weights) are taken for those of "
    "keras.applications"
)


class Step(NamedTuple):
    """One operation of a graph.

    Attributes:
        what: ``Conv2D(padding='same', strides=2)``, ``relu6``, ``Add``.
        inputs: how many steps before it stand those that it reads; beyond the first: the image.
        layer: what the file calls it.
    """

    what: str
    inputs: tuple[int, ...]
    layer: str


class _Layer(NamedTuple):
    """A layer as the file lists it: the names that it reads, and what else it is called with."""

    name: str
    kind: str
    config: dict[str, Any]
    inputs: list[str]
    numbers: list[float]


class _Value(NamedTuple):
    """What a layer returns.

    Attributes:
        step: which step it comes from; -1 for the image.
        size: its height and width.
        zeros: the layer that pads it first, if any.
    """

    step: int
    size: tuple[int | None, ...]
    zeros: _Layer | None = None


class Graph:
    """The steps of a graph up to its output, each behind those that it reads.

    Attributes:
        steps: see `Step`.
        size: height and width of the image; None where any will do.
        scaling: factor and offset that the graph applies to an image in [0, 255] first.
    """

    def __init__(self, whole: dict[str, Any], *, same: bool) -> None:
        """Reads what `keras.Model.get_config` wrote.

        Args:
            whole: the configuration, with its ``class_name``.
            same: take for SAME padding what computes it beforehand, from the size of the map.
        """
        self._same = same
        self.steps: list[Step] = []
        self.size: tuple[int | None, ...] = (None, None)
        self.scaling: tuple[Any, Any] = (1.0, 0.0)
        layers, output = _layers(whole)
        values: dict[str, _Value] = {}
        waiting = [output]
        while waiting:
            layer = layers[waiting[-1]]
            if missing := [name for name in layer.inputs if name not in values]:
                waiting.append(missing[0])
                if len(waiting) > len(layers):
                    raise ValueError("a layer reads itself")
            else:
                values[waiting.pop()] = self._compute(layer, [values[x] for x in layer.inputs])

    def _compute(self, layer: _Layer, read: list[_Value]) -> _Value:
        name, kind, config, _, numbers = layer
        if kind == "InputLayer":
            self.size = tuple((config.get("batch_shape") or config["batch_input_shape"])[1:3])
            return _Value(-1, self.size)
        if not self.steps and (scaling := _scaled(self.scaling, layer)):
            self.scaling = scaling
            return read[0]
        if kind == "ZeroPadding2D" and not read[0].zeros:
            return read[0]._replace(zeros=layer)
        size = tuple(n and -(-n // _plain(config.get("strides", 1))) for n in read[0].size)
        if kind in ("Conv2D", "DepthwiseConv2D"):
            zeros = read[0].zeros
            if _plain(config["kernel_size"]) == 1:  # nothing to pad
                config = config | {"padding": "valid"}
            elif self._same and zeros and _same_padding(read[0].size, config) == _sides(zeros):
                config, read = config | {"padding": "same"}, [read[0]._replace(zeros=None)]
        read = [
            self._step(_describe(*value.zeros[1:3], []), [value], value.zeros.name)
            if value.zeros
            else value
            for value in read
        ]
        value = read[0]
        if not _IDLE.fullmatch(kind) or (config.get("training") and "Random" not in kind):
            value = self._step(_describe(kind, config, numbers), read, name)
        if (activation := _named(config.get("activation"))) != "linear":
            value = self._step(activation, [value], name)
        return value._replace(size=size)

    def _step(self, what: str, read: list[_Value], layer: str) -> _Value:
        here = len(self.steps)
        inputs = tuple(here - value.step for value in read)
        self.steps.append(Step(_SYNONYMS.get(what, what), inputs, layer))
        return _Value(here, read[0].size)


def _layers(
    whole: dict[str, Any], prefix: str = "", reads: list[str] | None = None
) -> tuple[dict[str, _Layer], str]:
    """The layers by name, and the one whose output is the model's.

    Args:
        whole: a model, or one that is a layer of another, whose layers are listed like its own.
        prefix: of the names of its layers.
        reads: what a model within a model is called with.
    """
    graph = whole["config"]
    listed = graph["layers"] if isinstance(graph, dict) else graph  # Sequential's, years ago
    layers: dict[str, _Layer] = {}
    sequential = whole["class_name"] == "Sequential"
    name = ""
    for item in listed:
        config, before, kind = item["config"], name, item["class_name"]
        name, called = prefix + str(item.get("name") or config["name"]), {}
        if kind == "InputLayer" and reads is not None:
            config, kind, given = {}, "Identity", reads
        elif sequential:
            if before or kind == "InputLayer":
                given = [before] if before else []
            elif reads is not None:
                given = reads
            else:
                given = [f"input of {name}"]
                layers[given[0]] = _Layer(given[0], "InputLayer", config, [], [])
        else:
            given, called = _call(item["inbound_nodes"])
            given = [prefix + one if isinstance(one, str) else one for one in given]
        inputs = [one for one in given if isinstance(one, str)]
        if kind in ("Functional", "Model", "Sequential"):
            within, output = _layers(item, f"{name}/", inputs)
            layers |= within
            config, kind, given, inputs = {}, "Identity", [output], [output]
        numbers: list[Any] = given[len(inputs) :]
        layers[name] = _Layer(name, kind, {**config, **called}, inputs, numbers)
    if not sequential:
        [name] = [prefix + one for one in _flat(graph["output_layers"]) if isinstance(one, str)]
    return layers, name


def _call(nodes: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """What a layer of a graph is called with: names of layers, numbers; and keywords."""
    if not nodes:
        return [], {}
    [node] = nodes  # a layer that is used twice is in none of our networks
    if isinstance(node, dict):  # Keras 3
        return _flat(node["args"]), node["kwargs"]
    return [one[0] for one in node], {key: v for one in node for key, v in dict(*one[3:]).items()}


def _flat(args: Any) -> list[Any]:
    """Tensors by the names of their layers; lists, and what is in them, in one row."""
    if isinstance(args, dict):
        return [args["config"]["keras_history"][0]]
    return [one for arg in args for one in _flat(arg)] if isinstance(args, list) else [args]


def _describe(kind: str, config: dict[str, Any], numbers: list[float]) -> str:
    said = {key: _plain(value) for key, value in config.items() if not _HARMLESS.fullmatch(key)}
    said.pop("activation", None)  # a step of its own
    if kind.endswith(("Conv1D", "Conv2D")):
        said.pop("kernel_size", None)
    unusual = [f"{k}={v!r}" for k, v in sorted(said.items()) if v not in _USUAL.get(k, ())]
    unusual = [f"{number:.6g}" for number in numbers] + unusual
    return f"{kind}({', '.join(unusual)})" if unusual else kind


def _named(activation: Any) -> str:
    """The name of an activation, which a file may give as a function or a layer, too."""
    if not isinstance(activation, dict):
        return activation or "linear"
    within = activation["config"]
    return within if isinstance(within, str) else _describe(activation["class_name"], within, [])


def _plain(value: Any) -> Any:
    """``[2, 2]`` as 2, ``6.0`` as 6."""
    if isinstance(value, list | tuple):
        values = tuple(map(_plain, value))
        return values[0] if values and values.count(values[0]) == len(values) else values
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same_padding(size: tuple[int | None, ...], config: dict[str, Any]) -> Any:
    """What SAME adds on both sides of height and width; of sizes that are not known: even ones."""
    kernel, stride = _plain(config["kernel_size"]), _plain(config["strides"])
    sides = []
    for n in (side or 2 * stride * kernel for side in size):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides.append((total // 2, total - total // 2))
    return _plain(sides)


def _sides(zeros: _Layer) -> Any:
    return _plain(zeros.config["padding"])


def _scaled(scaling: tuple[Any, Any], layer: _Layer) -> tuple[Any, Any] | None:
    """The factor and offset of an image behind a layer, if that is all that it does."""
    factor, offset = scaling
    match layer.kind, layer.numbers:
        case "Rescaling", []:
            by, plus = np.float64(layer.config["scale"]), np.float64(layer.config["offset"])
            return factor * by, offset * by + plus
        case "TrueDivide" | "Divide", [by]:
            return factor / by, offset / by
        case "Multiply", [by]:
            return factor * by, offset * by
        case "Subtract", [less]:
            return factor, offset - less
        case "Add", [plus]:
            return factor, offset + plus
    return None


def read_graph(text: str, where: str, model: Model) -> tuple[Model, bool]:
    """Compares the graph in a file with the one that we build.

    Args:
        text: the configuration, JSON.
        where: the file.
        model: the network whose tensors the file has.

    Returns:
        The network with the size of images, and the scaling of pixels, of the graph; and whether
        that says how pixels are scaled.

    Raises:
        RequestError: the graph computes something else; the message names the layer.
    """
    try:
        graph = Graph(json.loads(text), same=model.name.startswith("tf_"))
        reason = _difference(graph.steps, model)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{where}: its graph cannot be followed ({error!r:.80}); {_WAY_AROUND}"
        ) from error
    if reason:
        raise RequestError(f"{where}: {reason}; {_WAY_AROUND}")
    return _prepared(model, graph)


def _difference(steps: list[Step], model: Model) -> str:
    """Where a graph leaves the one that we build; empty if it does not."""
    name, count, last = model.name, model.num_classes, "linear"
    if steps and steps[-1].what in ("softmax", "sigmoid"):
        *steps, (last, _, _) = steps
    wanted = _graphs()[re.sub(r"_\d{3}$", "", name)]
    tops = [i for i, step in enumerate(wanted) if step.what == _POOL]
    top = tops[-1] if tops else next(i for i, step in enumerate(wanted) if step.what == "Dense")
    own_hidden = len(model.stages) == len(build_model(name).stages)
    if not own_hidden or [step.what for step in steps[top:]] in ([_POOL], [_POOL, "Dense"]):
        wanted = [*wanted[:top], Step(_POOL, (1,), ""), Step("Dense", (1,), "")]
    for found, own in zip_longest(steps, wanted):
        if found is None:
            # Without a head; whether that may be, the tensors have said.
            headless = own.what in (_POOL, "Dense", "Conv2D")
            return "" if headless else f"its output is that of {steps[-1].layer!r:.80}"
        layer = f"layer {found.layer!r:.80}"
        if own is None or found.what != own.what:
            wanted = own.what if own else "its end"
            return f"{layer} is {found.what:.200}, where {name} has {wanted}"
        if found.inputs != own.inputs:
            return f"{layer} reads other layers than in {name}"
    if last == "sigmoid" and count > 1:
        return f"its {count} outputs end in a sigmoid: classes that do not exclude each other"
    if last == "softmax" and count == 1:
        return "its one output ends in a softmax, which is always 1"
    return ""


def _prepared(model: Model, graph: Graph) -> tuple[Model, bool]:
    preprocess = model.preprocess
    height, width = graph.size
    if height == width and isinstance(height, int):
        preprocess = preprocess.with_size(height)
    if not (says := graph.scaling != (1.0, 0.0)):
        return replace(model, preprocess=preprocess), says
    factor, offset = (np.broadcast_to(x, 3).tolist() for x in graph.scaling)
    return replace(
        model,
        preprocess=replace(
            preprocess,
            mean=tuple(-b / a / 255 for a, b in zip(factor, offset, strict=True)),
            std=tuple(1 / a / 255 for a in factor),
            channel_order="rgb",
        ),
    ), says


@cache
def _graphs() -> dict[str, list[Step]]:
    """The graphs that we build, by the name of a network without its width."""
    table = json.loads(files("tljax.pretrained").joinpath("keras_graphs.json").read_text("utf-8"))
    kinds = [Step(what, tuple(inputs), "") for what, *inputs in table["steps"]]
    return {name: [kinds[i] for i in graph] for name, graph in table["graphs"].items()}
