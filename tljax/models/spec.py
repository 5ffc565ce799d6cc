"""Serialization of models to JSON and back: names of modules and their settings, never code.

A stage of a registered architecture is a reference: ``{"name": "layer1", "of": "resnet50"}``. Any
other stage names its Flax class, which must be in `MODULES` or be supplied by the caller: reading
a model imports nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, fields
from typing import Any, get_args

from flax import linen as nn
from flax.core import FrozenDict

from tljax.models import MODELS, Model, Stage, abstract_variables, build_model, layers
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.settings import Dtype

VERSION = 1

MAX_CHANNELS = 1024
"""Largest number of input channels; hyperspectral images have a few hundred."""

Modules = Mapping[str, Callable[..., nn.Module]]
"""Flax classes by name."""

MODULES: Modules = {
    module.__name__: module
    for module in (
        *layers.LAYERS,
        layers.GlobalAveragePool,
        layers.LinearHead,
        layers.SimilarityHead,
    )
}
"""Classes that a model in JSON may name without being supplied."""


def to_json(model: Model) -> dict[str, Any]:
    """Convert a model to plain values for `json.dumps`; `from_json` builds an equal model.

    Settings of modules may be None, booleans, finite numbers, strings, lists, dicts and other
    modules. Lists are read back as tuples, dicts as `flax.core.FrozenDict`.

    Raises:
        RequestError: a setting of a stage has another type.
    """
    registered = build_model(model.name).stages if model.name in MODELS else ()
    known = {stage.name: stage for stage in registered}
    return {
        "version": VERSION,
        "name": model.name,
        "stages": [
            {"name": stage.name, "of": model.name}
            if known.get(stage.name) == stage
            else _known(stage._asdict())
            | _plain(stage.module, f"stage {stage.name} of {model.name}")
            for stage in model.stages
        ],
        "preprocess": _known(asdict(model.preprocess)),
        "dtype": model.dtype,
    }


_NEW = {"patch_size": 0, "use_bias": True, "dtype": "uint8"}
"""Settings that earlier versions do not know: left out if they are the default, so that these read
the file."""


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out the new settings that are the default."""
    return {
        name: value
        for name, value in settings.items()
        if not (name in _NEW and value == _NEW[name])
    }


def _plain(value: object, where: str) -> Any:
    if isinstance(value, nn.Module):
        name = type(value).__name__
        if MODULES.get(name, type(value)) is not type(value):
            raise RequestError(f"{where} is a {name} that is not tljax's: rename its class")
        names = [f.name for f in fields(value) if f.init and f.name != "parent"]
        values = _known({key: getattr(value, key) for key in names if key != "name" or value.name})
        settings = {key: _plain(setting, f"{key} of {where}") for key, setting in values.items()}
        return {"module": name, "settings": settings}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if type(value) in (list, tuple):
        return [_plain(item, where) for item in value]  # pyright: ignore[reportGeneralTypeIssues]
    if isinstance(value, Mapping) and {*map(type, value)} <= {str} and "module" not in value:
        return {key: _plain(item, where) for key, item in value.items()}
    raise RequestError(
        f"{where} is a {type(value).__name__}, which cannot be saved: "
        "make it a number, a string, a list, a dict or a module"
    )


def from_json(spec: object, modules: Modules | None = None) -> Model:
    """Build the model that `to_json` converted.

    Args:
        spec: the values that `to_json` returned.
        modules: Flax classes by name, in addition to `MODULES`.

    Raises:
        RequestError: a module is unknown, the values are of a later version of tljax, or they are
            damaged.
    """
    try:
        model = _model(spec, {**(modules or {}), **MODULES})
        abstract_variables(model)  # modules check some settings only when they are called
    except RequestError:
        raise
    except Exception as error:  # a module may raise anything if its settings are damaged
        reason = " ".join(repr(error).split())
        raise RequestError(f"its description of a model is damaged ({reason:.200})") from error
    return model


def _model(spec: Any, modules: Modules) -> Model:
    if (version := spec["version"]) != VERSION:
        raise RequestError(
            f"its model is described in version {version!r:.20}, and this tljax reads version "
            f"{VERSION}: upgrade it"
        )
    stages = tuple(_stage(stage, modules) for stage in spec["stages"])
    preprocess = Preprocess(**{key: _value(x, modules) for key, x in spec["preprocess"].items()})
    model = Model(spec["name"], stages, preprocess, spec["dtype"])
    for name in (model.name, *model.stage_names):
        if not (isinstance(name, str) and name and name.isprintable()):
            raise ValueError(f"{name!r:.80} is not a valid name")
    if len({*model.stage_names}) < len(stages) or "/" in "".join(model.stage_names):
        raise ValueError("duplicate stage names, or a name with a slash")
    if not is_valid_preprocess(preprocess) or model.dtype not in get_args(Dtype):
        raise ValueError((preprocess, model.dtype))
    return model


def _stage(spec: Any, modules: Modules) -> Stage:
    if "of" in spec:
        if spec["of"] not in MODELS:
            raise RequestError(f"this tljax has no model {spec['of']!r:.80}: upgrade it")
        return {stage.name: stage for stage in build_model(spec["of"]).stages}[spec["name"]]
    tokens = spec["prefix_tokens"], spec.get("patch_size", 0)
    stage = Stage(spec["name"], _value(spec, modules), spec["output"], *tokens)
    if stage.output not in ("map", "tokens", "vector") or {*map(type, tokens)} != {int}:
        raise ValueError(stage[2:])
    return stage


def _value(value: Any, modules: Modules) -> Any:
    if isinstance(value, list):
        return tuple(_value(item, modules) for item in value)
    if not isinstance(value, dict):
        return value
    if "module" not in value:
        return FrozenDict({key: _value(item, modules) for key, item in value.items()})
    name = value["module"]
    if name not in modules:
        raise RequestError(
            f"it needs the module {name!r:.80}, which tljax does not have: supply its Flax class "
            "with --extension FILE.py, in Python with modules={...}"
        )
    return modules[name](**_value(value["settings"], modules))


# --- checks of values that a file contains --------------------------------------------------------


def is_valid_preprocess(preprocess: Preprocess) -> bool:
    """Return True if all values have the right type and range; a file may contain any values."""
    size, resize, interpolation, mean, std, channel_order, dtype = astuple(preprocess)
    return (
        (is_side(size) and is_side(resize) and size <= resize)
        and (interpolation in ("bilinear", "bicubic") and dtype in ("uint8", "float32"))
        and (0 < len(mean) == len(std) <= MAX_CHANNELS)
        and (channel_order == "rgb" or (channel_order == "bgr" and len(mean) == 3))
        and (all(map(is_number, (*mean, *std))) and min(std) > 0)
    )


def is_number(value: object) -> bool:
    """Return True if a value is a number of magnitude below a million."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def is_side(value: object) -> bool:
    """Return True if a value can be the side of an image, in pixels: 1 to 10,000."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 10_000
