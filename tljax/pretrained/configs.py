"""Reader and writer of the configuration files of transformers and timm.

They hold what tensors cannot: the preprocessing, the class names, and the settings in which two
networks with the same tensors differ.
"""

import json
import reprlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tljax.models import MODELS, Model
from tljax.models.spec import is_number
from tljax.pretrained.catalog import default_names
from tljax.pretrained.processors import (
    DEFAULT_PROCESSORS,
    huggingface_preprocess,
    image_processor,
    timm_preprocess,
)
from tljax.pretrained.rules import RELU, Arguments, Config
from tljax.pretrained.sections import Section, read_section
from tljax.pretrained.tables.layouts import LAYOUTS
from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.settings import Kind
from tljax.runtime.task import CLASSIFICATION, Task

# Arguments of timm's model constructors with their supported values.
_SUPPORTED_ARGUMENTS = {
    "aa_layer": (None,),
    "features_only": (False,),
    "fix_stem_head": (False,),
    "global_pool": ("avg", "fast", "fastavg", None),
    "output_stride": (32,),
}
# Arguments that do not affect evaluation, or whose effect shows in the shapes of the tensors.
_IGNORED_ARGUMENTS = (
    *("num_classes", "in_chans", "img_size"),
    *("drop_rate", "drop_path_rate", "drop_block_rate", "bn_momentum"),
    *("zero_init_last", "aux_logits", "pretrained", "checkpoint_path", "scriptable", "exportable"),
    *("depths", "dims", "conv_mlp", "use_grn", "ls_init_value", "head_init_scale"),
)

# transformers' names of the tasks; it has none for ordered classes.
_PROBLEM_TYPES: dict[Kind, str] = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
# Keys of tljax in config.json, which transformers keeps and ignores.
_THRESHOLDS, _UNITS = "tljax_thresholds", "tljax_units"


class Description(NamedTuple):
    """Contents of the configuration files beside the weights.

    Attributes:
        classes: names of the classes, labels or numbers, one per output.
        preprocess: preprocessing that the weights expect; None if no file says.
        licence: license as the files name it, or "unknown".
        notes: remarks if the class names of the files do not match the logits, if the task is the
            default of transformers, or if its image processor does something else than ours.
        task: task of the network, as far as the files say.
        kinds: kinds of tasks that the files allow.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess | None
    licence: str
    notes: tuple[str, ...]
    task: Task
    kinds: tuple[Kind, ...]


def read_configs(folder: Path, model: Model) -> Description:
    """Read config.json and preprocessor_config.json, where they exist.

    Args:
        folder: a folder written by ``save_pretrained`` of transformers or timm.
        model: the network that the tensors in the folder fit.

    Raises:
        RequestError: a file is not JSON, or a value in it is invalid or not supported.
    """
    config = read_section(folder / "config.json")
    timm = config.section("pretrained_cfg")
    if not timm.values and "input_size" in config.values:  # timm's first versions
        timm = config
    _check_architecture(_tower(config), model)
    _check_outputs(config, model.num_classes)
    processor = read_section(folder / "preprocessor_config.json")
    preprocess, differences = None, ()
    if timm.values:
        preprocess, differences = timm_preprocess(timm, model.preprocess.channels)
    elif processor.values:
        default = DEFAULT_PROCESSORS.get(str(config.values.get("model_type")), "ConvNext")
        preprocess, differences = huggingface_preprocess(
            processor, default, model.preprocess.channels
        )
    source = timm if timm.values else config
    licence = source.get("license", lambda value: isinstance(value, str), "a string", "unknown")
    task, kinds, remarks = _task(config, model.num_classes)
    classes, notes = _classes(config, timm, model.num_classes, task.kind)
    return Description(classes, preprocess, licence, notes + remarks + differences, task, kinds)


def read_architecture(folder: Path) -> str | None:
    """Return the model that timm's config.json names, or None if tljax has none of that name.

    Networks that differ in geometry alone cannot be told apart by their tensors.

    Raises:
        RequestError: the network was built with arguments that tljax does not support.
    """
    config = read_section(folder / "config.json")
    if str(config.values.get("model_type")).startswith("siglip2"):
        raise RequestError(
            f"{config.where}: SigLIP 2 for images of any aspect ratio (NaFlex) is not supported; "
            "choose weights of a fixed resolution, such as google/siglip2-base-patch16-224"
        )
    architecture = config.values.get("architecture")
    architecture = architecture if isinstance(architecture, str) else ""
    name = _names_by_architecture().get(architecture)
    timm = LAYOUTS[name].get("timm") if name else None
    _check_arguments(config, architecture, timm.arguments(str(name)) if timm else RELU)
    return name if architecture else _transformer(_tower(config))


@cache
def _names_by_architecture() -> dict[str, str]:
    """Return the models by their names in timm."""
    return {
        each: name
        for name in MODELS
        for layout in LAYOUTS[name].values()
        for each in alternatives(layout.config(name).get("architecture"))
    }


def write_configs(
    folder: Path, model: Model, classes: tuple[str, ...], task: Task = CLASSIFICATION
) -> None:
    """Write config.json and preprocessor_config.json for transformers' ``from_pretrained``.

    Args:
        folder: folder of the weights.
        model: the network; its preprocessing is written too.
        classes: names of the classes, labels or numbers, one per output; empty for a backbone
            without a head.
        task: what the network predicts. Its mean and scale have no place in these files.

    Raises:
        RequestError: transformers has no such task.
    """
    if task.kind not in _PROBLEM_TYPES:
        raise RequestError(
            f"transformers has no task for ordered classes, so {folder} is not written; export "
            "this network as tljax, stablehlo or onnx"
        )
    settings = LAYOUTS[model.name]["huggingface"].config(model.name)
    config = {key: alternatives(value)[0] for key, value in settings.items()}
    [architecture] = config["architectures"]
    if "WithProjection" in architecture and model.num_classes:
        config["projection_dim"] = model.num_classes
    elif classes and "ForImageClassification" not in architecture:
        raise RequestError(
            f"transformers has no classifier with the pooling of {model.name}, so {folder} is not "
            "written; export this network as tljax, timm, stablehlo or onnx"
        )
    if classes:
        config |= {
            "id2label": {str(i): name for i, name in enumerate(classes)},
            "label2id": {name: i for i, name in enumerate(classes)},
        }
        if len(classes) > 1 or task.kind != "classification":  # transformers refuses one class
            config["problem_type"] = _PROBLEM_TYPES[task.kind]
        if task.kind == "multilabel":
            config[_THRESHOLDS] = task.thresholds
        if task.units:
            config[_UNITS] = task.units
    else:
        architecture = architecture.replace("ForImageClassification", "Model")
        config |= {"architectures": [architecture.replace("WithProjection", "")]}
    if model.preprocess.channels != 3:
        config["num_channels"] = model.preprocess.channels
    processor = image_processor(model.preprocess)
    for name, value in (("config.json", config), ("preprocessor_config.json", processor)):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def alternatives(value: Any) -> tuple[Any, ...]:
    """Return the values that a setting of a `Layout` accepts."""
    return value if isinstance(value, tuple) else (value,)


# Settings by which transformers tells networks with the same tensors apart, with its defaults.
_TRANSFORMER_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {"hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "vit_mae": {"hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "clip_vision_model": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}


def _tower(config: Section) -> Section:
    """Return the configuration of the image tower of a network for images and text."""
    return config.section("vision_config") if "vision_config" in config.values else config


def _transformer(config: Section) -> str | None:
    """Return the Vision Transformer that a configuration describes, if several are alike."""
    kind = str(config.values.get("model_type"))
    if kind not in _TRANSFORMER_DEFAULTS:
        return None
    values = {**_TRANSFORMER_DEFAULTS[kind], **config.values}
    for name in MODELS:
        layout = LAYOUTS[name].get("huggingface")
        expected = layout.config(name) if layout else {}
        is_kind = kind in alternatives(expected.get("model_type"))
        if is_kind and not _contradictions(values, expected):
            return name
    return None


def _contradictions(values: dict[str, Any], expected: Config) -> list[str]:
    """Return the settings that differ from the expected ones, out of those that are there."""
    return [
        key
        for key, value in expected.items()
        if key != "architectures"
        and values.get(key, alternatives(value)[0]) not in alternatives(value)
    ]


def _check_architecture(config: Section, model: Model) -> None:
    """Raise an error for a network with the same tensors but another computation."""
    name = model.name
    configs = [layout.config(name) for layout in LAYOUTS[name].values()]
    if kind := config.values.get("model_type"):  # transformers may have a network under two names
        configs = [
            each for each in configs if kind in alternatives(each.get("model_type"))
        ] or configs
    # The backbone is the same with another head, and positions are resized to another image size.
    supported = {
        key: value
        for each in configs
        for key, value in each.items()
        if key not in ("architectures", "image_size")
    }
    supported["auto_map"] = None
    if "num_channels" in supported:
        supported["num_channels"] = model.preprocess.channels
    for key in _contradictions(config.values, supported):
        only = " or ".join(repr(value) for value in alternatives(supported[key]))
        raise RequestError(
            f"{config.where}: the tensors are those of {name}, but {key} is "
            f"{reprlib.repr(config.values[key])}; tljax supports only {only}"
        )


def _check_arguments(config: Section, architecture: str, of_family: Arguments) -> None:
    """Raise an error for constructor arguments of timm that change the network."""
    is_tf = architecture.startswith("tf_")
    supported_arguments = _SUPPORTED_ARGUMENTS | {
        "bn_eps": (1e-3 if is_tf else 1e-5,),
        "norm_layer": () if "resnetv2" in architecture else ("batchnorm2d", "batchnorm"),
        "pad_type": ("same" if is_tf else "",),
        **of_family,
    }
    arguments, cfg = config.section("model_args"), config.section("pretrained_cfg")
    items = [(arguments.where, key, value) for key, value in arguments.values.items()]
    items += [
        (x.where, "global_pool", x.values["global_pool"])
        for x in (config, cfg)
        if "global_pool" in x.values
    ]
    for where, key, value in items:
        supported = supported_arguments.get(key, ())
        if key not in _IGNORED_ARGUMENTS and value not in supported:
            only = repr(supported[0]) if supported else "networks built without it"
            raise RequestError(
                f"{where}: {key} is {reprlib.repr(value)}; tljax supports only {only}; "
                "remove it if it changes nothing"
            )


def _check_outputs(config: Section, count: int) -> None:
    """Raise an error if the configuration is that of a head with more or fewer outputs."""
    for section in (config, config.section("model_args")):
        for key in ("num_classes", "num_labels"):
            if section.values.get(key) not in (None, 0, count):
                value = reprlib.repr(section.values[key])
                head = f"the head has {count} outputs" if count else "there is no head"
                raise section.error(f"{key} is {value}, but {head}; correct it")


def _task(config: Section, count: int) -> tuple[Task, tuple[Kind, ...], tuple[str, ...]]:
    """Return the task, the kinds that the configuration allows, and remarks.

    Without a problem_type, transformers takes one output for a number, and several for exclusive
    classes if the labels of the training data are integers.
    """
    problem = config.values.get("problem_type")
    if not count or problem is None:
        kinds = get_args(Kind)
        if count != 1 or "model_type" not in config.values:
            return CLASSIFICATION, kinds, ()
        note = (
            f"{config.where}: there is no problem_type for its single output, which transformers "
            "reads as a number; `tljax weights import --task` chooses another"
        )
        return Task("regression"), kinds, (note,)
    if problem == "single_label_classification" and count > 1:
        return CLASSIFICATION, ("classification",), ()
    if problem == "multi_label_classification":
        thresholds = config.get(
            _THRESHOLDS,
            lambda v: _is_list(v, count, lambda x: is_number(x) and 0 <= x <= 1),
            f"{count} numbers from 0 to 1",
            [],
        )
        task = Task("multilabel", thresholds=tuple(thresholds))
        if count == 1 and _THRESHOLDS not in config.values:  # the logit of one of two classes
            return CLASSIFICATION, ("classification", "multilabel", "ordinal"), ()
        return task, ("multilabel", "ordinal"), ()
    if problem == "regression":
        units = config.get(
            _UNITS,
            lambda v: _is_list(v, count, lambda x: isinstance(x, str)),
            f"{count} strings",
            [],
        )
        return Task("regression", units=tuple(units)), ("regression",), ()
    expected = "single_label_classification or " if count > 1 else ""
    raise config.error(
        f"problem_type is {reprlib.repr(problem)} with {count} outputs; tljax expects "
        f"{expected}multi_label_classification or regression; correct it"
    )


def _is_list(value: object, count: int, is_valid: Callable[[Any], bool]) -> bool:
    """Return True for a list of ``count`` valid items, or an empty one."""
    return isinstance(value, list) and len(value) in (0, count) and all(map(is_valid, value))


# --- classes -------------------------------------------------------------------------------------


def _classes(
    config: Section, timm: Section, count: int, kind: Kind
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the class names, and a remark if those of the files do not match the logits."""
    by_index = config.get("id2label", lambda value: isinstance(value, dict), "an object", {})
    section = config if "label_names" in config.values else timm
    by_position = section.get("label_names", lambda value: isinstance(value, list), "a list", [])
    if len(by_index) == count:
        names = [by_index.get(str(i)) for i in range(count)]
    elif len(by_position) == count:
        names = by_position
    else:
        total = len(by_index) or len(by_position)
        note = f"{config.where}: it names {total} classes, but the head has {count} outputs"
        return default_names(count, kind), (note,) if total else ()
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise config.error(f"the name of class {i} is {reprlib.repr(name)}; correct it")
    return tuple(names), ()
