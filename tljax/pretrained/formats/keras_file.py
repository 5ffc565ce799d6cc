"""The files in which Keras keeps weights, read and written without Keras.

There are three: the legacy ``.h5`` of Keras 1 and 2, weights alone or within a whole model, which
names layers and lists them in their order in the model; the ``.weights.h5`` of Keras 3, which
counts the layers of each class; and its ``.keras``, a zip archive with such a file in it.

Names of layers and weights changed over the years, and automatic ones depend on what else a process
had built, so Keras itself goes by the order of the layers. So do we, and the keys are the same for
all three: the class of a layer, counted as ``.weights.h5`` counts it, and the weight, as in
``conv2d_3/kernel`` and ``batch_normalization/moving_variance``. Nothing in a file is run: the
configuration of a whole model is data, too (see `keras_graph`).
"""

import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
}
"""The weights of each class of layers, in Keras' order. Biases and gammas may be absent."""

_IN_ARCHIVE = "model.weights.h5"
# TensorFlow 2.12 had another name for the layers, and on Windows backslashes in it.
_CONTAINERS = re.compile(r"(?:layers|_layer_checkpoint_dependencies)(?:\\(.+))?")

Layer = tuple[str, list[np.ndarray]]
"""What it is called in the file, by class or at all, and its weights in Keras' order."""


def hdf5_span(data: mmap.mmap) -> range | None:
    """Where the HDF5 file lies in a file of Keras; None if it is none of Keras'."""
    if data[: len(SIGNATURE)] == SIGNATURE:
        return range(len(data))
    return zip_spans(data).get(_IN_ARCHIVE) if is_zip(data) else None


def read(data: mmap.mmap, span: range) -> dict[str, np.ndarray]:
    """Reads any of the three.

    Args:
        data: the whole file.
        span: see `hdf5_span`.

    Returns:
        The weights as read-only views of ``data``.

    Raises:
        DamagedError: the file is cut off, or was changed.
        ValueError: it does not hold the weights of one plain model.
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
        known = WEIGHTS.get(kind)
        if known is None:
            labels = tuple(map(str, range(len(weights))))
        elif kind == "batch_normalization":
            labels = known[-len(weights) :]  # what may be absent comes first
        else:
            labels = known[: len(weights)]
        if len(labels) < len(weights):
            raise ValueError(f"a {kind} with {len(weights)} weights; save the network as it was")
        layer = f"{kind}_{counts[kind]}" if counts[kind] else kind
        counts[kind] += 1
        arrays |= {f"{layer}/{label}": w for label, w in zip(labels, weights, strict=True)}
    if sum(array.nbytes for array in arrays.values()) > len(span):
        raise DamagedError("it holds more than it could")
    return arrays


def configuration(data: mmap.mmap, span: range) -> str | None:
    """The JSON that describes the graph of a whole model; None where weights are alone.

    Raises: as `read`.
    """
    if is_zip(data):
        place = zip_spans(data).get("config.json", range(0))
        return data[place.start : place.stop].decode() or None
    return (File(data, span).root.texts("model_config") or [None])[0]


def _texts(group: Object, name: str) -> list[str]:
    """A list in an attribute; a long one is cut in pieces that are counted from 0."""
    whole = group.texts(name)
    if whole is not None:
        return whole
    pieces: list[str] = []
    number = 0
    while piece := group.texts(f"{name}{number}"):
        pieces += piece
        number += 1
    return pieces


def _order(config: str) -> dict[str, int]:
    """The place of every layer in the JSON of a whole model, those of models within it too."""
    names = re.findall(r'"name": "([^"]+)"', config)
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _legacy(root: Object, names: Iterable[str], order: Mapping[str, int]) -> Iterator[Layer]:
    """The layers of a legacy file. Their classes are not in it, but their weights tell.

    A model within the model has its weights in one group, those that were trained before all
    others, so it needs ``order``, which a whole model tells.
    """
    seen: set[int] = set()
    for name in names:
        group = root[name]
        if group.address in seen:
            raise DamagedError(f"{name!r:.80} is in it twice")
        seen.add(group.address)
        layers: dict[str, list[np.ndarray]] = {}
        for weight in _texts(group, "weight_names"):
            within = weight.rpartition("/")[0].rpartition("/")[2] if order else ""
            layers.setdefault(within, []).append(group[weight].array())
        for within in sorted(layers, key=lambda within: order.get(within, 0)):
            weights = layers[within]
            yield _class_of(within or name, [weight.shape for weight in weights]), weights


def _class_of(name: str, shapes: list[tuple[int, ...]]) -> str:
    match shapes:
        case [(_, _, _, _), (_, _, _, _), *_]:
            return "separable_conv2d"
        case [(height, _, inputs, 1), *_] if height > 1 < inputs:
            return "depthwise_conv2d"
        case [(_, _, _, _)] | [(_, _, _, _), (_,)]:
            return "conv2d"
        case [(_, _)] | [(_, _), (_,)]:
            return "dense"
        case [(_,), (_,), (_,), *_]:
            return "batch_normalization"
        case _:
            raise ValueError(
                f"layer {name!r:.80} is of no class that these networks have; if it is a model of "
                "its own, save that one alone"
            )


def _counted(root: Object, seen: set[int]) -> Iterator[Layer]:
    """The layers of a file of Keras 3, in order within each class; of a model within it first.

    Args:
        root: a model.
        seen: addresses of the models that were read; this one is added.
    """
    if root.address in seen:
        raise DamagedError("a model is in it twice")
    seen.add(root.address)
    groups: dict[str, Object] = {}
    for name in root.members:
        if found := _CONTAINERS.fullmatch(name):
            within = root[name]
            inside = {found[1]: within} if found[1] else {n: within[n] for n in within.members}
            groups |= inside
    if not groups:
        raise ValueError("an HDF5 file, but Keras did not write it: it names no layers")
    places = sorted(_position(name) for name in groups)
    for _, _, name in places:
        if "layers" in groups[name].members:
            yield from _counted(groups[name], seen)
    for kind, _, name in places:
        group = groups[name]
        weights = group["vars"] if "vars" in group.members else group
        if "vars" in group.members and weights.members:
            yield kind, [weights[str(i)].array() for i in range(len(weights.members))]


def _position(name: str) -> tuple[str, int, str]:
    """The class of a layer and its number in it, of ``conv2d_3``."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number), name) if number.isdecimal() else (name, 0, name)


def write(
    path: Path, arrays: Mapping[str, np.ndarray], names: Mapping[str, str], *, legacy: bool
) -> None:
    """Writes a file for ``load_weights`` of Keras. Equal input, equal bytes.

    Args:
        path: the file; an old one is replaced.
        arrays: every weight by key, layer for layer in the order of the model.
        names: what Keras calls each layer, by ours: ``{"conv2d_3": "block2_conv2"}``.
        legacy: ``.h5``, which Keras 2 reads as well, or ``.weights.h5``.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        layer, _, weight = key.partition("/")
        layers.setdefault(layer, {})[weight] = array
    with h5py.File(path, "w", libver="earliest") as file:
        if legacy:
            # Without a version Keras 2 takes the file for one of Keras 1, and turns the kernels.
            file.attrs.update({"keras_version": b"2.0.0", "backend": b"tensorflow"})
            file.attrs["layer_names"] = [names[layer].encode() for layer in layers]
        for layer, weights in layers.items():
            name = names[layer]
            group = file.create_group(name if legacy else f"layers/{layer}/vars")
            labels = [f"{name}/{weight}:0" for weight in weights]
            if legacy:
                group.attrs["weight_names"] = [label.encode() for label in labels]
            else:
                group.attrs["name"] = name
                labels = map(str, range(len(weights)))
            for label, array in zip(labels, weights.values(), strict=True):
                group.create_dataset(label, data=array)
