"""What the configuration files of transformers and timm say of a network; read and written.

Tensors do not tell everything: which pixels a network expects, how its classes are called, and
where two networks with the same tensors differ.
"""

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tljax.models import MODELS, Model
from tljax.models.spec import is_number, is_side
from tljax.pretrained.catalog import default_classes
from tljax.pretrained.layouts import LAYOUTS
from tljax.runtime.errors import RequestError
from tljax.runtime.files import written_whole
from tljax.runtime.types import Preprocess

_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}

# Of transformers: the resampling that each has if its file says none; which of them an architecture
# has if the file does not name it, where that is not ConvNext's.
_PROCESSORS = {"ConvNext": 3, "Bit": 3, "CLIP": 3, "MobileNetV1": 2, "MobileNetV2": 2}
_OWN_PROCESSORS = {"mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2"}

# Of timm's arguments: which values are those of the networks that we build. Those of the second
# line change nothing in evaluation, or the tensors tell.
_ARGUMENTS = {
    "aa_layer": (None,),
    "features_only": (False,),
    "fix_stem_head": (False,),
    "global_pool": ("avg", "fast", "fastavg", None),
    "in_chans": (3,),
    "output_stride": (32,),
}
_HARMLESS_ARGUMENTS = (
    *("num_classes", "drop_rate", "drop_path_rate", "drop_block_rate", "bn_momentum", "img_size"),
    *("zero_init_last", "aux_logits", "pretrained", "checkpoint_path", "scriptable", "exportable"),
)

# From this size on transformers' ConvNext processor resizes to a square without regard to shape.
_SQUASHED = 384


class Described(NamedTuple):
    """What the files beside the weights say.

    Attributes:
        classes: a name for every logit.
        preprocess: what the weights expect to see; None if no file says.
        licence: as the files name it, or "unknown".
        notes: a remark on names that are not those of the logits.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess | None
    licence: str
    notes: tuple[str, ...]


def read_configs(folder: Path, model: Model) -> Described:
    """Reads config.json and preprocessor_config.json, as far as they are there.

    Args:
        folder: what ``save_pretrained`` of transformers or timm writes.
        model: the network that the tensors in the folder fill.

    Raises:
        RequestError: a file is no JSON, a value in it makes no sense, or it asks for what tljax
            does not do.
    """
    config = _read(folder / "config.json")
    timm = config.section("pretrained_cfg")
    if not timm.values and "input_size" in config.values:  # as timm wrote it at first
        timm = config
    _check_architecture(config, model.name)
    _check_outputs(config, model.num_classes)
    processor = _read(folder / "preprocessor_config.json")
    preprocess = None
    if timm.values:
        preprocess = _timm_preprocess(timm)
    elif processor.values:
        own = _OWN_PROCESSORS.get(str(config.values.get("model_type")), "ConvNext")
        preprocess = _huggingface_preprocess(processor, own)
    source = timm if timm.values else config
    licence = source.get("license", lambda value: isinstance(value, str), "a text", "unknown")
    classes, notes = _classes(config, timm, model.num_classes)
    return Described(classes, preprocess, licence, notes)


def read_architecture(folder: Path) -> str | None:
    """The network that timm's config.json names, if we have one of that name.

    Two networks may differ in geometry alone, and then their tensors do not tell which it is.

    Raises:
        RequestError: the network was built with arguments that make another one of it.
    """
    config = _read(folder / "config.json")
    _check_arguments(config)
    said = config.values.get("architecture")
    names = {
        layout.config(name).get("architecture"): name
        for name in MODELS
        for layout in LAYOUTS[name].values()
    }
    return names.get(said) if isinstance(said, str) else None


def write_configs(folder: Path, model: Model, classes: tuple[str, ...]) -> None:
    """Writes what ``from_pretrained`` of the network and of ``AutoImageProcessor`` read."""
    config = LAYOUTS[model.name]["huggingface"].config(model.name)
    if classes:
        config |= {
            "id2label": {str(i): name for i, name in enumerate(classes)},
            "label2id": {name: i for i, name in enumerate(classes)},
        }
    else:
        [name] = config["architectures"]
        config |= {"architectures": [name.replace("ForImageClassification", "Model")]}
    preprocess = model.preprocess
    filters = {name: number for number, name in _PILLOW_FILTERS.items()}
    processor = {
        # Of transformers' processors the one that resizes and crops as ours does at any size.
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resize},
        "resample": filters[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocess.size, "width": preprocess.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }
    for name, value in (("config.json", config), ("preprocessor_config.json", processor)):
        with written_whole(folder / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class _Section:
    """A JSON object whose values are checked when they are read.

    Attributes:
        where: its file, and its key there.
        values: the object; empty if there is none.
    """

    where: str
    values: dict[str, Any]

    def get(
        self, key: str, good: Callable[[Any], bool], expected: str, default: object = None
    ) -> Any:
        """A value that is ``good``; null counts as missing, and then the default is good enough."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not good(value):
            found = "is missing" if value is None else f"is {reprlib.repr(value)}"
            raise self.refusal(f"{key} {found} and should be {expected}; correct it")
        return value

    def section(self, key: str) -> "_Section":
        """An object inside this one."""
        value = self.get(key, lambda value: isinstance(value, dict), "an object", {})
        return _Section(f"{self.where}: {key}", value)

    def refusal(self, reason: str) -> RequestError:
        """The error that says why, and the way around it."""
        return RequestError(
            f"{self.where}: {reason}, or give the weight file by itself: "
            "it gets the usual preprocessing of its architecture"
        )


def _read(path: Path) -> _Section:
    whole = _Section(str(path), {})
    if not path.exists():
        return whole
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise whole.refusal(f"cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise whole.refusal("is JSON, but not an object; fetch it again")
    return _Section(str(path), values)


def _check_architecture(config: _Section, name: str) -> None:
    """Refuses networks that have the same tensors and compute something else."""
    own = {
        key: value
        for layout in LAYOUTS[name].values()
        for key, value in layout.config(name).items()
        if key != "architectures"  # the backbone is the same with another head
    }
    for key, expected in {**own, "auto_map": None}.items():
        value = config.values.get(key, expected)
        if value != expected:
            raise RequestError(
                f"{config.where}: the tensors are those of {name}, but {key} is "
                f"{reprlib.repr(value)}; tljax builds only the network where it is {expected!r}"
            )


def _check_arguments(config: _Section) -> None:
    """Refuses what timm was asked to build otherwise than it does by default."""
    name = str(config.values.get("architecture"))
    is_mobile, is_tf = "mobilenet" in name or "lite" in name, name.startswith("tf_")
    arguments_of = _ARGUMENTS | {
        "act_layer": ("hard_swish" if "netv3" in name else "relu6" if is_mobile else "relu",),
        "bn_eps": (1e-3 if is_tf else 1e-5,),
        "norm_layer": () if "resnetv2" in name else ("batchnorm2d", "batchnorm"),
        "pad_type": ("same" if is_tf else "",),
    }
    arguments, cfg = config.section("model_args"), config.section("pretrained_cfg")
    said = [(arguments.where, key, value) for key, value in arguments.values.items()]
    said += [(x.where, "global_pool", x.values.get("global_pool", "avg")) for x in (config, cfg)]
    for where, key, value in said:
        built = arguments_of.get(key, ())
        if key not in _HARMLESS_ARGUMENTS and value not in built:
            only = f"where it is {built[0]!r}" if built else "that timm builds without it"
            raise RequestError(
                f"{where}: {key} is {reprlib.repr(value)}; tljax builds only the network {only}; "
                "remove it if it changes nothing"
            )


def _check_outputs(config: _Section, count: int) -> None:
    """Refuses outputs that are not the logits of classes that exclude each other."""
    for section in (config, config.section("model_args")):
        for key in ("num_classes", "num_labels"):
            if section.values.get(key) not in (None, 0, count):
                said = reprlib.repr(section.values[key])
                found = f"the head has {count} outputs" if count else "there is no head"
                raise section.refusal(f"{key} is {said}, but {found}; correct it")
    problem = config.values.get("problem_type")
    if problem is None and count == 1 and "model_type" in config.values:
        problem = "regression"  # which transformers makes of one output
    known = "multi_label_classification" if count == 1 else "single_label_classification"
    if count and problem not in (None, known):
        raise config.refusal(
            f"problem_type is {reprlib.repr(problem)} with {count} outputs; tljax takes them for "
            f"{known}; correct it"
        )


# --- classes -------------------------------------------------------------------------------------


def _classes(
    config: _Section, timm: _Section, count: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the logits, and a remark if there are names that cannot be theirs."""
    by_index = config.get("id2label", lambda value: isinstance(value, dict), "an object", {})
    section = config if "label_names" in config.values else timm
    in_order = section.get("label_names", lambda value: isinstance(value, list), "a list", [])
    if len(by_index) == count:
        names = [by_index.get(str(i)) for i in range(count)]
    elif len(in_order) == count:
        names = in_order
    else:
        said = len(by_index) or len(in_order)
        note = f"{config.where}: its names are of {said} classes, and the head has {count} outputs"
        return default_classes(count), (note,) if said else ()
    for i, name in enumerate(names):
        if not isinstance(name, str):
            found = reprlib.repr(name)
            raise config.refusal(f"class {i} of {count} has no name but {found}; correct it")
    return tuple(names), ()


# --- preprocessing -------------------------------------------------------------------------------


def _timm_preprocess(cfg: _Section) -> Preprocess:
    """As timm's ``create_transform`` evaluates: short side to size / crop_pct, central crop."""
    cfg.get("crop_mode", lambda value: value == "center", "'center'", "center")
    _, size, _ = cfg.get(
        "input_size",
        lambda v: isinstance(v, list) and v[:1] == [3] and is_side(v[-1]) and v[1:] == v[-1:] * 2,
        "[3, n, n] with n in pixels",
    )
    interpolation = cfg.get(
        "interpolation", lambda value: value in ("bilinear", "bicubic"), "bilinear or bicubic"
    )
    resize = math.floor(size / cfg.get("crop_pct", _is_share, "a number above 0, at most 1"))
    return Preprocess(size, resize, interpolation, *_mean_and_std(cfg, "mean", "std"))


def _huggingface_preprocess(processor: _Section, own: str) -> Preprocess:
    """As transformers' image processors in `_PROCESSORS`; ``own`` is the one that goes unsaid.

    If the crop leaves out an odd number of pixels, theirs may lie one pixel nearer to the top left:
    they round down where torchvision, timm and we round to even.
    """
    for key in ("do_resize", "do_rescale", "do_normalize"):
        processor.get(key, lambda value: value is True, "true", default=True)
    processor.get(
        "rescale_factor", lambda v: is_number(v) and math.isclose(v, 1 / 255), "1/255", 1 / 255
    )
    old, new = "feature_extractor_type", "image_processor_type"
    kind = processor.get(
        old if processor.values.get(new) is None else new,
        lambda value: isinstance(value, str) and value.startswith(tuple(_PROCESSORS)),
        f"that of {', '.join(_PROCESSORS)}: they keep the shape of a photograph",
        own,
    )
    default = next(value for name, value in _PROCESSORS.items() if kind.startswith(name))
    resample = processor.get("resample", lambda value: value in (2, 3), "2 or 3", default)
    edge = _side(processor, "size", "shortest_edge")
    if kind.startswith("ConvNext"):
        processor.get("do_center_crop", lambda value: value is False, "false", default=False)
        share = processor.get("crop_pct", _is_share, "a number above 0, at most 1", 224 / 256)
        crop, resize = edge, math.floor(edge / share)
        if edge >= _SQUASHED:
            raise processor.refusal(
                f"from {_SQUASHED} px on this image processor squashes photographs into a square, "
                "which tljax does not do; choose a smaller size"
            )
    else:
        processor.get("do_center_crop", lambda value: value is True, "true", default=True)
        crop, resize = _side(processor, "crop_size", "height", "width"), edge
        if crop > resize:
            raise processor.refusal(f"crop_size {crop} is more than size {resize}; correct it")
    interpolation: Any = _PILLOW_FILTERS[resample]
    statistics = _mean_and_std(processor, "image_mean", "image_std")
    return Preprocess(crop, resize, interpolation, *statistics)


def _side(processor: _Section, key: str, *names: str) -> int:
    """A length in pixels, alone or under each of the names."""

    def good(value: object) -> bool:
        if isinstance(value, dict):
            sides = [value.get(name) for name in names]
            return all(map(is_side, sides)) and len(set(sides)) == 1
        return is_side(value)

    expected = "n or {" + ", ".join(f"'{name}': n" for name in names) + "} with n in pixels"
    value = processor.get(key, good, expected)
    return value[names[0]] if isinstance(value, dict) else value


def _mean_and_std(section: _Section, mean: str, std: str) -> tuple[Any, Any]:
    def is_triple(value: object) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))

    return (
        tuple(section.get(mean, is_triple, "3 numbers")),
        tuple(section.get(std, lambda v: is_triple(v) and min(v) > 0, "3 numbers above 0")),
    )


def _is_share(value: object) -> bool:
    return is_number(value) and 0.01 <= value <= 1  # pyright: ignore[reportOperatorIssue]
