"""Loading, saving and exporting of pretrained networks."""

import json
import re
import shlex
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Float

from tljax.models import MODELS, Model, abstract_variables, build_model, with_head
from tljax.models.spec import Modules, from_json, is_valid_preprocess, to_json
from tljax.pretrained.catalog import CATALOG, Entry, catalog_name, default_classes, default_names
from tljax.pretrained.configs import read_architecture, read_configs, write_configs
from tljax.pretrained.fetch import fetch, fetch_hub, fetch_url
from tljax.pretrained.formats import (
    Tensors,
    digest,
    read_tensors,
    write_keras,
    write_npz,
    write_safetensors,
    write_torch,
)
from tljax.pretrained.keras_graph import read_graph
from tljax.pretrained.rules import Rule, Rules, apply_rules, compare, invert_rules, native_rules
from tljax.pretrained.tables.keras import (
    layer_names,
    normalization_weights,
    read_normalization,
    with_normalization,
)
from tljax.pretrained.tables.layouts import LAYOUTS, Identity, check, identify, table
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Dtype, Kind
from tljax.runtime.task import CLASSIFICATION, Task
from tljax.runtime.trees import flatten
from tljax.runtime.types import NORMALIZATIONS, Preprocess, Variables


@dataclass(frozen=True)
class Card:
    """Metadata of weights; their preprocessing belongs to the model.

    Attributes:
        classes: names of what the network predicts: classes, labels or numbers, one per output;
            for ordered classes one more; empty for a backbone without a head.
        source: origin of the weights: a catalog name, hub id, URL or path.
        licence: SPDX identifier of the license, or "unknown".
        sha256: SHA-256 of the file that was read; of the pretrained file for a fine-tuned network.
        layout: layout of the keys in the file: one of `LAYOUTS`, or ``tljax``.
        notes: assumptions made while loading, one line each, to be shown to the user; not saved.
        task: what the network predicts and how its outputs are read.
    """

    classes: tuple[str, ...]
    source: str
    licence: str
    sha256: str
    layout: str
    notes: tuple[str, ...] = ()
    task: Task = CLASSIFICATION

    def guess(self, probabilities: Float[np.ndarray, " names"], index: int) -> dict[str, Any]:
        """Return the name, the index and the probability of a class or label, as JSON."""
        return {
            "name": self.classes[index],
            "index": int(index),
            "probability": float(probabilities[index]),
        }

    def index_of(self, name: str) -> int:
        """Return the index of a class, label or number in `classes`.

        It is the index of its output as well, except for ordered classes.

        Args:
            name: name of the class. An exact match is preferred to one in another case. If no class
                has this name, the index itself is accepted, unless all class names are numbers.

        Raises:
            RequestError: no class has this name, or several do; the message gives the nearest name,
                or their indices.
        """
        one, many = _NOUNS[self.task.kind]
        name, *classes = (unicodedata.normalize("NFC", each) for each in (name, *self.classes))
        matches = [i for i, each in enumerate(classes) if each == name]
        matches = matches or [i for i, each in enumerate(classes) if each.lower() == name.lower()]
        is_index = name.isdecimal() and not all(each.isdecimal() for each in classes)
        if not matches and is_index and int(name) < len(classes):
            return int(name)
        if len(matches) == 1:
            return matches[0]
        if matches:  # ImageNet has two cranes and two maillots
            indices = " or ".join(map(str, matches))
            raise RequestError(f"{len(matches)} {many} are called '{name}'; use {indices}")
        near = get_close_matches(name, classes, n=1)
        hint = f"did you mean {near[0]}?" if near else "`tljax.load_pretrained` lists card.classes"
        raise RequestError(f"no {one} is called '{name}' among {len(classes)}; {hint}")


_NOUNS: dict[Kind, tuple[str, str]] = {
    "classification": ("class", "classes"),
    "multilabel": ("label", "labels"),
    "regression": ("number", "numbers"),
    "ordinal": ("class", "ordered classes"),
}


class Pretrained(NamedTuple):
    """A model, its variables (float32, on the host) and their metadata.

    Attributes:
        model: the network.
        variables: its parameters and batch statistics.
        card: class names, origin and license of the weights.
    """

    model: Model
    variables: Variables
    card: Card

    def with_size(self, size: int | None) -> "Pretrained":
        """Return the network with another image size in pixels; None changes nothing."""
        if size is None:
            return self
        preprocess = self.model.preprocess.with_size(size)
        return self._replace(model=replace(self.model, preprocess=preprocess))

    def require_classes(self) -> "Pretrained":
        """Return the network unchanged if it predicts named classes, labels or numbers.

        Raises:
            RequestError: the network is a backbone without a head, or has more or fewer outputs
                than names.
        """
        outputs, names, task = self.model.num_classes, len(self.card.classes), self.card.task
        one, many = _NOUNS[task.kind]
        if not outputs:
            raise RequestError(
                f"{self.card.source} is a backbone without a head, so it has no {many}; add a head "
                "for yours with tljax train"
            )
        if outputs != task.num_outputs(names):
            outcome = "it is not a classifier" if task == CLASSIFICATION else "they do not fit"
            raise RequestError(
                f"{self.card.source} has {outputs} outputs but {names} {one} names: {outcome}"
            )
        return self

    def require_task(self, *kinds: Kind) -> "Pretrained":
        """Return the network unchanged if its task is of one of some kinds.

        Raises:
            RequestError: its task is another one.
        """
        if self.card.task.kind not in kinds:
            required = " or ".join(_NOUNS[kind][1] for kind in kinds)
            raise RequestError(
                f"{self.card.source} predicts {_NOUNS[self.card.task.kind][1]}, but this needs a "
                f"network that predicts {required}"
            )
        return self


def load_pretrained(
    weights: str | Path,
    *,
    model: str | None = None,
    normalization: str | None = None,
    task: Kind | None = None,
    modules: Modules | None = None,
) -> Pretrained:
    """Load pretrained weights, detecting their format and architecture.

    Args:
        weights: a name of `CATALOG` (``resnet50.tv_in1k``, ``keras:VGG16``,
            ``torchvision:resnet50``); a Hugging Face hub id (``microsoft/resnet-50``,
            ``timm/resnet50.tv_in1k``); a file or its URL (safetensors, ``.pth``, ``.npz``,
            ``.h5``, ``.keras``; also xz-compressed); a folder written by ``save_pretrained`` of
            transformers or timm; or a run directory of ``tljax train``. The base of an adapter is
            loaded from where it was and merged with it, see `tljax.load_adapter`.
        model: required architecture, a key of `MODELS`; None detects it. It is needed for a single
            file whose tensors fit two networks. (A timm ResNet with blurred or averaged strides,
            such as resnetblur50 and resnetaa50, has the same tensors as tljax's and can be told
            apart only by its config.json.)
        normalization: key of `NORMALIZATIONS` that a single file without such information expects;
            None means the default of its architecture and format.
        task: kind of the task of weights that do not say it, such as a single file of PyTorch; None
            means that of the weights, or else classification. The names of ordered classes, one
            more than outputs, are known only to files in tljax's format.
        modules: Flax classes by name for the user-defined stages of a file in tljax's format. A
            file by itself never imports code.

    Returns:
        The network with the preprocessing that its weights expect. For classification, a head with
        one output, read as the logit of a sigmoid, becomes one with two classes. Weights without a
        head give a backbone: ``num_classes`` is 0, and `apply` returns its features.

    Raises:
        RequestError: the weights are not found, cannot be fetched, do not fit any network or the
            required one, or fit several; or their metadata describes an unsupported network,
            another normalization or another task.
    """
    if task not in (None, *get_args(Kind)):
        raise RequestError(f"there is no task '{task}'; choose from {', '.join(get_args(Kind))}")
    found = _find(weights, model, modules)
    pretrained, has_preprocess = _with_two_classes(_with_task(found, task)), found.has_preprocess
    channels = pretrained.model.preprocess.channels
    if channels != 3 and not has_preprocess:
        note = (
            f"{weights}: the mean and deviation of its {channels} input channels are not stored; "
            "for all of them those of RGB are averaged"
        )
        card = replace(pretrained.card, notes=(*pretrained.card.notes, note))
        pretrained = pretrained._replace(card=card)
    if normalization is None:
        return pretrained
    if channels != 3:
        raise RequestError(
            f"{weights} has {channels} input channels: a normalization is of RGB; leave it out"
        )
    if normalization not in NORMALIZATIONS:
        names = ", ".join(NORMALIZATIONS)
        raise RequestError(f"there is no normalization '{normalization}'; choose from {names}")
    own = pretrained.model.preprocess
    requested = own.with_normalization(normalization)
    if has_preprocess and requested != own:
        mean, std = (" ".join(f"{value:z.4g}" for value in x) for x in (own.mean, own.std))
        raise RequestError(
            f"{pretrained.card.source} expects {own.channel_order.upper()} with mean {mean} and "
            f"std {std}, not the normalization '{normalization}'; leave out the normalization"
        )
    return pretrained._replace(model=replace(pretrained.model, preprocess=requested))


class _Found(NamedTuple):
    """A network as it was found.

    Attributes:
        network: the network.
        has_preprocess: whether its preprocessing was published with the weights.
        kinds: kinds of tasks that its weights and their metadata allow.
    """

    network: Pretrained
    has_preprocess: bool
    kinds: tuple[Kind, ...]


def _find(weights: str | Path, model: str | None, modules: Modules | None) -> _Found:
    if model is not None:
        build_model(model)  # report a misspelled name before anything is downloaded
    name = str(weights)
    if entry := catalog_name(name):
        return _load_catalog(entry, CATALOG[entry], model)
    if name.startswith(("https://", "http://")):
        return _load_file(fetch_url(name), name, model, modules)
    path = Path(weights)
    if path.is_dir():
        return _load_folder(path, name, model, modules)
    if path.exists():
        return _load_file(path, name, model, modules)
    in_folder = path.parent.name and path.parent.is_dir()
    if in_folder or name[:1] in (".", "~") or path.parent.name == "runs":  # not a hub id
        near = get_close_matches(path.name, [x.name for x in path.parent.glob("*")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RequestError(f"{name} does not exist{hint}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (".safetensors", ".pth"):
        return _load_folder(fetch_hub(name), name, model, modules)
    hint = "`tljax weights list` prints the known names"
    if name.lower().startswith("keras:"):  # few and similar names: list them all
        hint = f"known names: {', '.join(key for key in CATALOG if key.startswith('keras:'))}"
    elif near := get_close_matches(name, CATALOG, n=1, cutoff=0.5):
        hint = f"did you mean {near[0]}?"
    raise RequestError(f"no weights are called '{name}' and no such file exists; {hint}")


def _with_task(found: _Found, kind: Kind | None) -> Pretrained:
    """Return the network with a task of the kind that was asked for."""
    network, card = found.network, found.network.card
    if kind is not None and (kind not in found.kinds or not card.classes):
        own = _NOUNS[card.task.kind][1] if card.classes else "features"
        raise RequestError(f"{card.source} predicts {own}, so its task is not {kind}; leave it out")
    if kind not in (None, card.task.kind):
        outputs, classes = len(card.classes), card.classes
        if classes == default_names(outputs, card.task.kind):
            classes = default_names(outputs, kind)
        card = replace(card, classes=classes, task=Task(kind))
    return network._replace(card=card)


def _with_two_classes(pretrained: Pretrained) -> Pretrained:
    """Turn a single logit into two: the sigmoid of x is the softmax of (0, x)."""
    model, variables, card = pretrained
    if card.task != CLASSIFICATION or not model.has_linear_head or model.num_classes != 1:
        return pretrained
    model, name = with_head(model, 2), model.stage_names[-1]
    head = {k: np.insert(leaf, 0, 0, axis=-1) for k, leaf in variables["params"][name].items()}
    [only] = card.classes
    classes = default_classes(2) if card.classes == default_classes(1) else (f"not {only}", only)
    note = f"{card.source}: its single output is read as the sigmoid logit of '{classes[1]}'"
    variables = {**variables, "params": {**variables["params"], name: head}}
    return Pretrained(model, variables, replace(card, classes=classes, notes=(*card.notes, note)))


def _load_catalog(name: str, entry: Entry, model: str | None) -> _Found:
    if model not in (None, entry.model):
        raise RequestError(f"{name} holds {entry.model}, not {model}")
    path = fetch(name)
    load = _load_folder if path.is_dir() else _load_file
    loaded, has_preprocess, _ = load(path, name, entry.model)
    preprocess = loaded.model.preprocess if has_preprocess else entry.preprocess
    card = replace(loaded.card, licence=entry.licence)
    count = len(card.classes)
    if count not in (0, 1000, 1001) and card.classes == default_classes(count):
        note = f"{name}: its {count:,} classes have no names; they are called 'class 0', ..."
        card = replace(card, notes=(*card.notes, note))
    built = replace(loaded.model, preprocess=preprocess)
    return _Found(Pretrained(built, loaded.variables, card), True, ("classification",))


def _load_folder(
    folder: Path, name: str, model: str | None, modules: Modules | None = None
) -> _Found:
    """Load a run directory, or a folder written by ``save_pretrained`` of transformers or timm."""
    for best in (folder / "best" / "model.safetensors", folder / "best" / "adapter.safetensors"):
        if best.exists():
            return _load_file(best, name, model, modules)
    files = [folder / file for file in _WEIGHT_FILES if (folder / file).exists()]
    if not files and (folder / "config.json").exists() and (folder / "checkpoints").is_dir():
        raise RequestError(
            f"{folder} is an unfinished run; finish it first: "
            f"tljax train --resume {shlex.quote(str(folder))}"
        )
    if not files:
        expected = ", ".join(_WEIGHT_FILES)
        raise RequestError(f"{folder} is neither a run directory nor a saved model: no {expected}")
    architecture = read_architecture(folder)
    found = _load_file(files[0], name, model or architecture, modules)
    if found.has_preprocess:
        return found
    loaded = found.network
    classes, preprocess, licence, notes, task, kinds = read_configs(folder, loaded.model)
    built = replace(loaded.model, preprocess=preprocess or loaded.model.preprocess)
    notes = loaded.card.notes + notes
    card = replace(loaded.card, classes=classes, licence=licence, notes=notes, task=task)
    return _Found(Pretrained(built, loaded.variables, card), preprocess is not None, kinds)


_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


ADAPTER = "tljax_adapter"
"""Key in the metadata of a file whose base is elsewhere, see `tljax.pretrained.adapters`."""


def _load_file(path: Path, name: str, model: str | None, modules: Modules | None = None) -> _Found:
    tensors = read_tensors(path)
    if ADAPTER in tensors.metadata:
        # Adapters are above this module, because their base is loaded by it.
        from tljax.pretrained.adapters import read_adapter  # noqa: PLC0415

        own = read_adapter(path, tensors, None, modules).merged()
        if model not in (None, own.model.name):
            raise RequestError(f"{path} adapts {own.model.name}, not {model}")
        return _Found(own, True, (own.card.task.kind,))
    if "tljax" in tensors.metadata:
        own = _load_native(path, tensors, model, modules)
        return _Found(own, True, (own.card.task.kind,))
    kinds: tuple[Kind, ...] = get_args(Kind)
    if graph := tensors.metadata.get("keras"):
        identity, rules, (built, has_preprocess, kinds) = _identify_keras(
            tensors.arrays, name, model, graph
        )
    else:
        identity = check(tensors.arrays, name, model)
        rules, built = table(identity.model, identity.layout), identity.model
        preprocess = with_normalization(built.preprocess, identity.arrays)
        has_preprocess = preprocess != built.preprocess
        built = replace(built, preprocess=preprocess)
    variables = apply_rules(rules, identity.arrays, abstract_variables(identity.model), name)
    notes = identity.notes(name) + (_twin_notes(identity, name) if model is None else ())
    if graph and built.num_classes and kinds == get_args(Kind):
        note = (
            f"{name}: its last layer has no activation, so its outputs are read as logits of "
            "classes; `tljax weights import --task` chooses another"
        )
        notes = (*notes, note)
    classes = default_names(built.num_classes, kinds[0])
    card = Card(classes, name, "unknown", digest(path, "sha256"), identity.layout, notes)
    return _Found(
        Pretrained(built, variables, replace(card, task=Task(kinds[0]))), has_preprocess, kinds
    )


def _identify_keras(
    arrays: Mapping[str, np.ndarray], where: str, model: str | None, graph: str
) -> tuple[Identity, Rules, tuple[Model, bool, tuple[Kind, ...]]]:
    """Identify a whole Keras model, whose head may be a new Dense layer, also without a bias.

    Returns:
        The identity, its key table, and the result of `read_graph`.
    """
    dense = {key.partition("/")[0]: a for key, a in arrays.items() if key.startswith("dense")}
    biases = {f"{layer}/bias": np.zeros(a.shape[-1], np.float32) for layer, a in dense.items()}
    arrays = biases | dict(arrays)
    statistics = read_normalization(arrays)
    try:
        identity = check(arrays, where, model)
    except RequestError:
        backbone = {key: a for key, a in arrays.items() if key.partition("/")[0] not in dense}
        identity = identify(backbone, model)
        if identity.difference.leftover and not identity.difference.missing:
            read_graph(
                graph, where, identity.model, statistics
            )  # its error names the additional layer
        if not dense or any(identity.difference):
            raise
    else:
        rules = table(identity.model, identity.layout)
        return identity, rules, read_graph(graph, where, identity.model, statistics)
    *_, head = dense
    rules = table(identity.model, identity.layout)
    rules += tuple(Rule(f"{head}/{leaf}", f"params/head/{leaf}") for leaf in ("kernel", "bias"))
    whole = with_head(identity.model, arrays[f"{head}/bias"].size)
    read = read_graph(graph, where, whole, statistics)  # its error names an additional layer
    ignore = LAYOUTS[whole.name][identity.layout].ignore
    difference = compare(rules, arrays, abstract_variables(whole), ignore)
    if any(difference):
        raise RequestError(f"{where} does not fit {whole.name} with a new head: {difference}")
    return identity._replace(model=whole, arrays=arrays), rules, read


def _twin_notes(identity: Identity, where: str) -> tuple[str, ...]:
    """Return a note on other networks with the same tensors; raise if tljax has one.

    Networks that compute the same need no choice: only their preprocessing differs.
    """
    name, body = identity.model.name, build_model(identity.model.name).stages
    twins = LAYOUTS[name][identity.layout].twins(name)
    same = tuple(x for x in twins if x in MODELS and build_model(x).stages == body)
    twins = tuple(twin for twin in twins if twin not in same)
    notes = (
        f"{where} is loaded as {name}, with its preprocessing; {other} is the same network with "
        f"another one (pass --model {other} if that is right)"
        for other in same
    )
    if supported := [twin for twin in twins if twin in MODELS]:
        raise RequestError(
            f"{where} fits {name} and {' and '.join(supported)}, which have the same tensors; "
            f"choose one: --model {' or --model '.join((name, *supported))} (model= in Python)"
        )
    if not twins:
        return (*notes,)
    note = (
        f"{where} is loaded as {name}; its tensors also fit {' and '.join(twins)}, which tljax "
        f"does not support (pass --model {name} if that is right)"
    )
    return (*notes, note)


# --- tljax's own format: safetensors whose keys are paths, with the metadata in the header -------


_VERSION = 3  # 3 adds the task to version 2


def _load_native(
    path: Path, tensors: Tensors, model: str | None, modules: Modules | None
) -> Pretrained:
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


# --- export to other layouts --------------------------------------------------------------------


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
    arrays = _without_zeros(invert_rules(rules, variables), LAYOUTS[model.name][layout].optional)
    if layout == "huggingface":
        if extra := [key for key in arrays if key.endswith(LAYOUTS[model.name][layout].optional)]:
            raise RequestError(
                f"transformers has no {extra[0]}, which is not zero here; {path} is not written: "
                "export this network as tljax, timm, stablehlo or onnx"
            )
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
