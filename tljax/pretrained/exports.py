"""Write networks in the formats of other projects."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from tljax.models import Model, build_model, with_head
from tljax.pretrained.configs import write_configs
from tljax.pretrained.formats import (
    write_keras,
    write_npz,
    write_safetensors,
    write_torch,
)
from tljax.pretrained.native import save
from tljax.pretrained.network import Pretrained
from tljax.pretrained.rules import invert_rules
from tljax.pretrained.tables.keras import layer_names, normalization_weights
from tljax.pretrained.tables.layouts import LAYOUTS, table
from tljax.runtime.errors import RequestError
from tljax.runtime.task import Task
from tljax.runtime.types import Variables


def export(path: Path, pretrained: Pretrained, layout: str) -> None:
    """Write a network in the layout of another project.

    Their heads return numbers in their units: the mean and scale of a regression become part of its
    kernel and bias. Of the rest of the task, only huggingface keeps something: its kind, thresholds
    and units. It has no ordered classes.

    Args:
        path: output file, ``.safetensors``, ``.pth`` or ``.npz``. For ``huggingface``, a folder for
            ``from_pretrained`` of transformers; for ``keras``, a file for ``load_weights`` of
            Keras, ``.weights.h5`` or ``.h5``.
        pretrained: the network to export.
        layout: one of the model's `LAYOUTS`, or ``tljax``.

    Raises:
        RequestError: the model has no such layout or other stages than it, the layout has no such
            task, or the suffix of the file is unknown.
    """
    model, variables, card = pretrained
    if layout == "tljax":
        return save(path, pretrained)
    rules, whole = table(model, layout), build_model(model.name)
    linear = model.has_linear_head or not model.num_classes
    cuts = (None,) if model.num_classes else (None, *whole.stage_names[:-1])
    exportable = [with_head(whole, model.num_classes, after=after).stages for after in cuts]
    if not linear or with_head(model, model.num_classes).stages not in exportable:
        raise RequestError(
            f"the {layout} layout requires a {model.name} with all its stages and a linear head; "
            "export this network as tljax, stablehlo or onnx"
        )
    variables = _with_units(model, jax.device_get(variables), card.task)
    optional = LAYOUTS[model.name][layout].optional
    arrays = _without_zeros(invert_rules(rules, variables), optional)
    if layout in _PROGRAMS:
        _refuse(arrays, optional, f"{_PROGRAMS[layout]} has no", path)
    if layout == "huggingface":
        write_configs(path, model, card.classes, card.task)
        write_safetensors(path / "model.safetensors", arrays, {"format": "pt"})
    elif layout == "keras":
        if path.suffix != ".h5":
            raise RequestError(f"Keras cannot read {path.name}; use the suffix .weights.h5 or .h5")
        write_keras(path, normalization_weights(model) | arrays, layer_names(model.name))
    elif path.suffix == ".safetensors":
        write_safetensors(path, arrays, {"format": "pt"})
    elif path.suffix in (".pth", ".pt", ".bin"):
        write_torch(path, arrays)
    elif path.suffix == ".npz":
        write_npz(path, arrays)
    else:
        raise RequestError(f"unknown format: {path}; use the suffix .safetensors, .pth or .npz")
    return None


_PROGRAMS = {"huggingface": "transformers", "open_clip": "open_clip"}
"""Layouts whose programs have no place for optional tensors at all."""


def _refuse(
    arrays: Mapping[str, np.ndarray], optional: tuple[str, ...], reason: str, path: Path
) -> None:
    """Raise an error if there is an optional tensor."""
    if extra := [key for key in arrays if key.endswith(optional)]:
        raise RequestError(
            f"{reason} {extra[0]}, which is not zero here; {path} is not written: export this "
            "network as tljax, timm, stablehlo or onnx"
        )


def _without_zeros(
    arrays: Mapping[str, np.ndarray], optional: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Leave out optional tensors that are zero."""
    return {key: x for key, x in arrays.items() if not key.endswith(optional) or x.any()}


def _with_units(model: Model, variables: Variables, task: Task) -> Variables:
    """Return variables of a linear head that returns numbers in their units."""
    if not (task.mean or task.scale):
        return variables
    name, scale = model.stage_names[-1], np.asarray(task.scale or 1.0)
    old = variables["params"][name]
    head = {
        "kernel": old["kernel"] * scale,
        "bias": old["bias"] * scale + np.asarray(task.mean or 0.0),
    }
    head = {leaf: values.astype(old[leaf].dtype) for leaf, values in head.items()}
    return {**variables, "params": {**variables["params"], name: head}}
