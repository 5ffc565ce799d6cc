"""A model as JSON and back: the names of its stages' modules and their settings, never code.

A stage of a registered architecture is a reference: ``{"name": "layer1", "of": "resnet50"}``. Any
other one names its Flax class, which is one of `MODULES` or supplied by whoever reads: reading
imports nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, fields
from typing import Any, get_args

from flax import linen as nn
from flax.core import FrozenDict

from tljax.models import MODELS, Model, Stage, abstract_variables, build_model, layers
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Dtype
from tljax.runtime.types import Preprocess

VERSION = 1

Modules = Mapping[str, Callable[..., nn.Module]]
"""Flax classes by the names that a description calls them."""

MODULES: Modules = {
    module.__name__: module
    for module in (*layers.LAYERS, layers.GlobalAveragePool, layers.LinearHead)
}
"""What a description may name without the reader's help."""


def to_json(model: Model) -> dict[str, Any]:
    """Describe a model: plain values for `json.dumps`, from which `from_json` builds an equal one.

    Settings are None, booleans, finite numbers, strings, lists, dicts and other modules; lists come
    back as tuples, dicts as Flax's frozen ones.

    Raises:
        RequestError: a setting of a stage is anything else.
    """
    own = build_model(model.name).stages if model.name in MODELS else ()
    known = {stage.name: stage for stage in own}
    return {
        "version": VERSION,
        "name": model.name,
        "stages": [
            {"name": stage.name, "of": model.name}
            if known.get(stage.name) == stage
            else stage._asdict() | _plain(stage.module, f"stage {stage.name} of {model.name}")
            for stage in model.stages
        ],
        "preprocess": asdict(model.preprocess),
        "dtype": model.dtype,
    }


def _plain(value: object, where: str) -> Any:
    if isinstance(value, nn.Module):
        name = type(value).__name__
        if MODULES.get(name, type(value)) is not type(value):
            raise RequestError(
                f"{where} is a {name} that is not tljax's; give its class a new name"
            )
        names = [f.name for f in fields(value) if f.init and f.name != "parent"]
        given = {each: getattr(value, each) for each in names if each != "name" or value.name}
        settings = {each: _plain(setting, f"{each} of {where}") for each, setting in given.items()}
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
        f"{where} is a {type(value).__name__}, which cannot be written down; "
        "make it a number, a string, a list, a dict or a module"
    )


def from_json(spec: object, modules: Modules | None = None) -> Model:
    """Build the model that `to_json` described.

    Args:
        spec: what was described; anything else is refused.
        modules: Flax classes by name, for those that `MODULES` lacks.

    Raises:
        RequestError: a module is not known, a later version of tljax wrote the description, or it
            is damaged.
    """
    try:
        model = _model(spec, {**(modules or {}), **MODULES})
        abstract_variables(model)  # settings of a wrong kind show when the modules are called
    except RequestError:
        raise
    except Exception as error:  # whatever a module says of damaged settings
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
            raise ValueError(f"{name!r:.80} is no name")
    if len({*model.stage_names}) < len(stages) or "/" in "".join(model.stage_names):
        raise ValueError("two stages of one name, or a name with a slash")
    if not is_sound(preprocess) or model.dtype not in get_args(Dtype):
        raise ValueError((preprocess, model.dtype))
    return model


def _stage(spec: Any, modules: Modules) -> Stage:
    if "of" in spec:
        if spec["of"] not in MODELS:
            raise RequestError(f"this tljax has no model {spec['of']!r:.80}: upgrade it")
        return {stage.name: stage for stage in build_model(spec["of"]).stages}[spec["name"]]
    stage = Stage(spec["name"], _value(spec, modules), spec["output"], spec["prefix_tokens"])
    if stage.output not in ("map", "tokens", "vector") or type(stage.prefix_tokens) is not int:
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


# --- what a file may say of a number --------------------------------------------------------------


def is_sound(preprocess: Preprocess) -> bool:
    """Return whether the values, which a file may give, make sense."""
    size, resize, interpolation, mean, std, channel_order = astuple(preprocess)
    return (
        (is_side(size) and is_side(resize) and size <= resize)
        and (interpolation in ("bilinear", "bicubic") and channel_order in ("rgb", "bgr"))
        and (len(mean) == len(std) == 3 and all(map(is_number, (*mean, *std))) and min(std) > 0)
    )


def is_number(value: object) -> bool:
    """Return whether a value is a number, and not a huge one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def is_side(value: object) -> bool:
    """Return whether a value can be a side of an image, in pixels."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 10_000
