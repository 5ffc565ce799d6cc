"""tljax's own format: safetensors whose keys are paths, with the metadata in the header."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tljax.models import Model, abstract_variables, build_model, with_head
from tljax.models.spec import Modules, from_json, is_valid_preprocess, to_json
from tljax.pretrained.formats import Tensors, write_safetensors
from tljax.pretrained.network import Card, Pretrained
from tljax.pretrained.rules import apply_rules, native_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.settings import Dtype, Kind
from tljax.runtime.task import CLASSIFICATION, Task
from tljax.runtime.trees import flatten

_VERSION = 3  # 3 adds the task to version 2


def load_native(
    path: Path, tensors: Tensors, model: str | None, modules: Modules | None
) -> Pretrained:
    """Build the network that a file describes.

    Args:
        path: the file, for error messages.
        tensors: its content.
        model: required architecture; None accepts any.
        modules: Flax classes by name for user-defined stages.

    Raises:
        RequestError: the header is damaged, of a later version or of another architecture, or the
            tensors do not fit it.
    """
    try:
        header = json.loads(tensors.metadata["tljax"])
        card = read_card(header["card"])
        version = int(header.get("version", 1))
        built = _first_version(header, len(card.classes)) if version == 1 else None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{path}: its tljax header is damaged ({error!r:.200}); write or fetch the file again"
        ) from error
    if version > _VERSION:
        raise RequestError(
            f"{path} is version {version} of tljax's format, but this tljax reads up to version "
            f"{_VERSION}: upgrade tljax"
        )
    try:
        built = built or from_json(header.get("model"), modules)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    if model not in (None, built.name):
        raise RequestError(f"{path} holds {built.name}, not {model}")
    if fault := task_fault(built, card):
        raise RequestError(
            f"{path}: its tljax header is damaged ({fault:.200}); write or fetch the file again"
        )
    expected = abstract_variables(built)
    rules = native_rules(tensors.arrays, expected, f"{path} does not fit {built.name}")
    return Pretrained(built, apply_rules(rules, tensors.arrays, expected, str(path)), card)


def read_card(values: dict[str, Any]) -> Card:
    """Build the card that a header describes; `task_fault` checks its task.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: the values are damaged.
    """
    settings: dict[str, Any] = {
        k: tuple(x) if isinstance(x, list) else x for k, x in values.get("task", {}).items()
    }
    classes = tuple(map(str, values["classes"]))
    return Card(**{**values, "classes": classes, "notes": (), "task": Task(**settings)})


def card_json(card: Card) -> dict[str, Any]:
    """Return the values of a card that are saved, for `read_card`."""
    values = {**asdict(card), "layout": "tljax"}
    del values["notes"]
    return values


_TASK_SETTINGS = {"multilabel": ("thresholds",), "regression": ("mean", "scale", "units")}


def task_fault(model: Model, card: Card) -> str:
    """Return what is wrong with a task; empty if it is valid."""
    task, names = card.task, len(card.classes)
    if task.kind not in get_args(Kind):
        return f"there is no task {task.kind!r}"
    for name, values in asdict(task).items():
        allowed = (0, names) if name in _TASK_SETTINGS.get(task.kind, ()) else (0,)
        if name != "kind" and not (isinstance(values, tuple) and len(values) in allowed):
            return f"{name} of the task {task.kind} for {names} names is {values!r}"
    valid = {
        "thresholds": all(_is_finite(x) and 0 <= x <= 1 for x in task.thresholds),
        "mean": all(map(_is_finite, task.mean)),
        "scale": all(_is_finite(x) and x > 0 for x in task.scale),
        "units": all(isinstance(x, str) for x in task.units),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            return f"{name} of the task is {getattr(task, name)!r}"
    # Networks for classification with unnamed outputs are older than this check.
    if task.kind != "classification" and model.num_classes != task.num_outputs(names):
        return f"{model.num_classes} outputs for the task {task.kind} with {names} names"
    return ""


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # a file may hold an int of any length


def _first_version(header: dict[str, Any], num_classes: int) -> Model:
    """Build the model of a header without a version: an architecture with a linear head."""
    statistics = {key: tuple(header["preprocess"][key]) for key in ("mean", "std")}
    preprocess = Preprocess(**{**header["preprocess"], **statistics})
    # The first files had no dtype and no dropout.
    dtype = np.dtype(header.get("dtype", "float32")).name
    dropout = float(header.get("dropout", 0))
    after = None if header.get("head_after") is None else str(header["head_after"])
    if not (is_valid_preprocess(preprocess) and 0 <= dropout < 1 and dtype in get_args(Dtype)):
        raise ValueError((preprocess, dtype, dropout))
    whole = build_model(str(header["model"]))
    built = with_head(whole, num_classes, after=after, dropout=dropout)
    return replace(built, preprocess=preprocess, dtype=dtype)


def save(path: Path, pretrained: Pretrained) -> None:
    """Write a network in tljax's own format: one safetensors file for `load_pretrained`.

    The file describes all stages, user-defined ones too; see `tljax.models.spec`.

    Args:
        path: output file; an existing one is replaced.
        pretrained: the network to save.

    Raises:
        RequestError: a setting of a stage is not serializable, the variables or the task do not fit
            the model, or the file cannot be written.
    """
    model, variables, card = pretrained
    if fault := task_fault(model, card):
        raise RequestError(f"{path} is not written: {fault:.200}")
    saved_card = card_json(card)
    version = _VERSION
    if card.task == CLASSIFICATION:  # so that earlier versions of tljax read the file
        version = 2
        del saved_card["task"]
    header = {"version": version, "model": to_json(model), "card": saved_card}
    flat = {key: np.asarray(value) for key, value in flatten(variables).items()}
    misfit = f"{path} is not written, as its variables do not fit {model.name}"
    native_rules(flat, abstract_variables(model), misfit)
    write_safetensors(path, flat, {"tljax": json.dumps(header)})
