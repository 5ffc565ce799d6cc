"""Reading and writing of Keras' weight files, without Keras.

There are three formats: the legacy ``.h5`` of Keras 1 and 2, with weights alone or a whole model,
which lists the names of the layers in the order of the model; the ``.weights.h5`` of Keras 3, which
numbers the layers of each class; and ``.keras``, a zip archive that contains a ``.weights.h5``.

Names of layers and weights differ between versions of Keras, and generated names depend on the
other models of the process, so Keras identifies layers by their order. So does this module, and the
keys are the same for all three formats: the class of a layer, numbered as in ``.weights.h5``, and
the name of the weight, as in ``conv2d_3/kernel`` and ``batch_normalization/moving_variance``.
Nothing in a file is executed; the configuration of a whole model is read as data (see
`tljax.pretrained.keras_graph`).
"""

import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path

import h5py
import numpy as np

from tljax.pretrained.formats.hdf5 import SIGNATURE, File, Object
from tljax.pretrained.formats.torch_file import is_zip, zip_spans
from tljax.pretrained.formats.torch_pickle import DamagedError

WEIGHTS = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "separable_conv2d": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "layer_scale": ("gamma",),
    "normalization": ("mean", "variance", "count"),
}
"""The weights of each layer class in Keras' order. Biases and gammas may be absent."""

_IN_ARCHIVE = "model.weights.h5"
# TensorFlow 2.12 used another name for the layers, on Windows with backslashes.
_CONTAINERS = re.compile(r"(?:layers|_layer_checkpoint_dependencies)(?:\\(.+))?")

Layer = tuple[str, list[np.ndarray]]
"""The class of a layer and its weights in Keras' order."""


def hdf5_span(data: mmap.mmap) -> range | None:
    """Return the position of the HDF5 file in a Keras file; None for other files."""
    if data[: len(SIGNATURE)] == SIGNATURE:
        return range(len(data))
    return zip_spans(data).get(_IN_ARCHIVE) if is_zip(data) else None


def read(data: mmap.mmap, span: range) -> dict[str, np.ndarray]:
    """Read the weights of a file in any of the three formats.

    Args:
        data: the whole file.
        span: position of the HDF5 file, from `hdf5_span`.

    Returns:
        The weights by key, as read-only views of ``data``.

    Raises:
        DamagedError: the file is truncated or damaged.
        ValueError: the file does not contain the weights of a single model of known layers.
    """
    root = File(data, span).root
    order: dict[str, int] = {}
    if "model_weights" in root.members:
        order = _order((root.texts("model_config") or [""])[0])
        root = root["model_weights"]
    names = _texts(root, "layer_names")
    arrays: dict[str, np.ndarray] = {}
    counts: Counter[str] = Counter()
    for kind, weights in _legacy(root, names, order) if names else _counted(root, set()):
        labels = WEIGHTS.get(kind, tuple(map(str, range(len(weights)))))
        # Only the last weights may be absent, but of a batch norm the first ones.
        first = kind == "batch_normalization"
        labels = labels[-len(weights) :] if first else labels[: len(weights)]
        if len(labels) < len(weights):
            raise ValueError(f"a {kind} layer with {len(weights)} weights is not supported")
        layer = f"{kind}_{counts[kind]}" if counts[kind] else kind
        counts[kind] += 1
        arrays |= {f"{layer}/{label}": w for label, w in zip(labels, weights, strict=True)}
    if sum(array.nbytes for array in arrays.values()) > len(span):
        raise DamagedError("its weights are larger than the file")
    return arrays


def configuration(data: mmap.mmap, span: range) -> str | None:
    """Return the JSON configuration of a whole model; None if the file has only weights.

    Raises the errors of `read`.
    """
    if is_zip(data):
        entry = zip_spans(data).get("config.json", range(0))
        return data[entry.start : entry.stop].decode() or None
    return (File(data, span).root.texts("model_config") or [None])[0]


def _texts(group: Object, name: str) -> list[str]:
    """Return a list of texts in an attribute; Keras splits long ones into name0, name1, ..."""
    texts = group.texts(name)
    if texts is not None:
        return texts
    chunks = map(group.texts, (f"{name}{number}" for number in count()))
    return [text for chunk in takewhile(bool, chunks) for text in chunk or ()]


def _order(config: str) -> dict[str, int]:
    """Return the position of each layer in the JSON of a model, including nested models."""
    names = re.findall(r'"name": "([^"]+)"', config)
    return {name: position for position, name in enumerate(dict.fromkeys(names))}


def _legacy(root: Object, names: Iterable[str], order: Mapping[str, int]) -> Iterator[Layer]:
    """Yield the layers of a legacy file, whose classes follow from the shapes of their weights.

    A nested model has all weights in one group, trainable ones first. Their layers are sorted by
    ``order``, which only a whole model contains; without it, they must be of different classes.
    Nested models come first, as in other files.
    """
    seen: set[int] = set()
    groups: list[dict[str, list[np.ndarray]]] = []
    for name in names:
        group = root[name]
        if group.address in seen:
            raise DamagedError(f"{name!r:.80} occurs twice")
        seen.add(group.address)
        layers: dict[str, list[np.ndarray]] = {}
        for weight in _texts(group, "weight_names"):
            layer = weight.rpartition("/")[0].rpartition("/")[2]
            layers.setdefault(layer or name, []).append(group[weight].array())
        groups.append(dict(sorted(layers.items(), key=lambda item: order.get(item[0], 0))))
    for layers in sorted(groups, key=lambda layers: len(layers) == 1):
        kinds = [_class_of(name, [w.shape for w in weights]) for name, weights in layers.items()]
        if len({*kinds}) < len(kinds) and not order:
            raise _unsupported(next(iter(layers)))
        yield from zip(kinds, layers.values(), strict=True)


def _unsupported(name: str) -> ValueError:
    return ValueError(
        f"layer {name!r:.80} is of an unsupported class; if it is a nested model, save it alone"
    )


def _class_of(name: str, shapes: list[tuple[int, ...]]) -> str:
    match shapes:
        case [(_, _, _, _), (_, _, _, _), *_]:
            kind = "separable_conv2d"
        case [(height, _, inputs, 1), *_] if height > 1 < inputs:
            kind = "depthwise_conv2d"
        case [(_, _, _, _)] | [(_, _, _, _), (_,)]:
            kind = "conv2d"
        case [(_, _)] | [(_, _), (_,)]:
            kind = "dense"
        case [(_,), (_,), (_,), *_]:
            kind = "batch_normalization"
        case [(_,), (_,)]:
            kind = "layer_normalization"
        case [(_,)]:
            kind = "layer_scale"
        case [(_,), (_,), ()]:
            kind = "normalization"
        case _:
            raise _unsupported(name)
    return kind


def _counted(root: Object, seen: set[int]) -> Iterator[Layer]:
    """Yield the layers of a Keras 3 file, in order within each class, nested models first.

    Args:
        root: group of a model.
        seen: addresses of the models read so far; this one is added.
    """
    if root.address in seen:
        raise DamagedError("a model occurs twice")
    seen.add(root.address)
    groups: dict[str, Object] = {}
    for name in root.members:
        if match := _CONTAINERS.fullmatch(name):
            group = root[name]
            groups |= {match[1]: group} if match[1] else {n: group[n] for n in group.members}
    if not groups:
        raise ValueError("an HDF5 file without layers, not written by Keras")
    layers = sorted(_class_and_number(name) for name in groups)
    for _, _, name in layers:
        if "layers" in groups[name].members:
            yield from _counted(groups[name], seen)
    for kind, _, name in layers:
        group = groups[name]
        weights = group["vars"] if "vars" in group.members else group
        if "vars" in group.members and weights.members:
            yield kind, [weights[str(i)].array() for i in range(len(weights.members))]


def _class_and_number(name: str) -> tuple[str, int, str]:
    """Split a name such as ``conv2d_3`` into class and number; return both and the name."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number), name) if number.isdecimal() else (name, 0, name)


def write(
    path: Path, arrays: Mapping[str, np.ndarray], names: Mapping[str, str], *, legacy: bool
) -> None:
    """Write a file for ``load_weights`` of Keras. Equal inputs give equal bytes.

    Args:
        path: path of the file; an existing one is replaced.
        arrays: all weights by key, layer by layer in the order of the model.
        names: name of each layer in Keras, by its key: ``{"conv2d_3": "block2_conv2"}``; with the
            name of a model inside the network as a prefix, and a slash.
        legacy: write the format of ``.h5``, which Keras 2 reads as well, not of ``.weights.h5``.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        layer, _, weight = key.partition("/")
        layers.setdefault(layer, {})[weight] = array
    with h5py.File(path, "w", libver="earliest") as file:
        if legacy:
            _write_legacy(file, {names[layer]: weights for layer, weights in layers.items()})
        else:
            groups = _groups({layer: names[layer] for layer in layers})
            for layer, weights in layers.items():
                group = file.create_group(f"{groups[layer]}/vars")
                group.attrs["name"] = names[layer].rpartition("/")[2]
                for number, array in enumerate(weights.values()):
                    group.create_dataset(str(number), data=array)


def _write_legacy(file: h5py.File, layers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write the weights of layers by name, those of a nested model in one group."""
    # Without a version Keras 2 assumes a file of Keras 1 and flips the kernels.
    file.attrs.update({"keras_version": b"2.0.0", "backend": b"tensorflow"})
    groups: dict[str, dict[str, np.ndarray]] = {}
    for layer, weights in layers.items():
        labels = {f"{layer}/{weight}:0": array for weight, array in weights.items()}
        groups.setdefault(layer.partition("/")[0], {}).update(labels)
    file.attrs["layer_names"] = [name.encode() for name in groups]
    for name, labels in groups.items():
        group = file.create_group(name)
        group.attrs["weight_names"] = [label.encode() for label in labels]
        for label, array in labels.items():
            group.create_dataset(label, data=array)


def _groups(names: Mapping[str, str]) -> dict[str, str]:
    """Return the group of each layer in a ``.weights.h5``: numbered by class within its model."""
    counts: Counter[str] = Counter()

    def numbered(path: str) -> str:
        counts[path] += 1
        return f"{path}_{counts[path] - 1}" if counts[path] > 1 else path

    models, groups = {"": ""}, {}
    for key, name in names.items():
        model = name.rpartition("/")[0]
        if model not in models:
            models[model] = numbered("layers/sequential") + "/"
        groups[key] = numbered(f"{models[model]}layers/{_class_and_number(key)[0]}")
    return groups
