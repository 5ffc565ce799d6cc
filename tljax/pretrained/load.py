"""Load pretrained networks from every format, detecting which one it is."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np

from tljax.models import MODELS, Model, abstract_variables, build_model, with_head
from tljax.models.spec import Modules
from tljax.pretrained.catalog import CATALOG, Entry, catalog_name, default_classes, default_names
from tljax.pretrained.configs import read_architecture, read_configs
from tljax.pretrained.fetch import fetch, fetch_hub, fetch_object, fetch_url
from tljax.pretrained.formats import digest, read_tensors
from tljax.pretrained.identify import Identity, identify
from tljax.pretrained.keras_graph import read_graph
from tljax.pretrained.native import load_native
from tljax.pretrained.network import NOUNS, Card, Pretrained
from tljax.pretrained.rules import Rule, Rules, apply_rules, compare
from tljax.pretrained.tables.keras import read_normalization, with_normalization
from tljax.pretrained.tables.layouts import LAYOUTS, table
from tljax.pretrained.unwrap import check
from tljax.runtime.errors import RequestError
from tljax.runtime.files import in_bucket, open_path
from tljax.runtime.preprocess import NORMALIZATIONS
from tljax.runtime.settings import Kind
from tljax.runtime.task import CLASSIFICATION, Task


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
            transformers or timm; or a run directory of ``tljax train``. Files and folders may be in
            a bucket (``gs://``). The base of an adapter is loaded from where it was and merged with
            it, see `tljax.load_adapter`.
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


def load_zeros(name: str) -> Pretrained:
    """Return a network of `CATALOG` with zeros for its weights: its programs, without a download.

    Args:
        name: name of weights, as for `load_pretrained`.

    Raises:
        RequestError: the catalog has no such weights.
    """
    key = catalog_name(name)
    if key is None:
        raise RequestError(f"no weights of the catalog are called '{name}'")
    entry = CATALOG[key]
    model = replace(build_model(entry.model, entry.classes), preprocess=entry.preprocess)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_variables(model))
    card = Card(default_classes(entry.classes), key, entry.licence, "none", "tljax")
    return Pretrained(model, zeros, card)


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
    path = open_path(weights)
    name = str(path) if in_bucket(path) else name
    if path.is_dir():
        return _load_folder(path, name, model, modules)
    if path.exists():
        return _load_file(path, name, model, modules)
    if in_bucket(path):
        raise RequestError(f"{path} does not exist")
    in_folder = path.parent.name and path.parent.is_dir()
    if in_folder or name[:1] in (".", "~") or path.parent.name == "runs":  # not a hub id
        near = get_close_matches(path.name, [x.name for x in path.parent.glob("*")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RequestError(f"{name} does not exist{hint}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (".safetensors", ".pth"):
        return _load_folder(fetch_hub(name), name, model, modules)
    raise RequestError(f"no weights are called '{name}' and no such file exists; {_hint(name)}")


def _hint(name: str) -> str:
    """Return where a name of weights may be found that nothing is called by."""
    if name.lower().startswith("keras:"):  # few and similar names: list them all
        return f"known names: {', '.join(key for key in CATALOG if key.startswith('keras:'))}"
    if near := get_close_matches(name, CATALOG, n=1, cutoff=0.5):
        return f"did you mean {near[0]}?"
    return "`tljax weights list` prints the known names"


def _with_task(found: _Found, kind: Kind | None) -> Pretrained:
    """Return the network with a task of the kind that was asked for."""
    network, card = found.network, found.network.card
    if kind is not None and (kind not in found.kinds or not card.classes):
        own = NOUNS[card.task.kind][1] if card.classes else "features"
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
    local = fetch_object(path)
    tensors = read_tensors(local)
    if ADAPTER in tensors.metadata:
        # Adapters are above this module, because their base is loaded by it.
        from tljax.pretrained.adapters import read_adapter  # noqa: PLC0415

        own = read_adapter(path, tensors, None, modules).merged()
        if model not in (None, own.model.name):
            raise RequestError(f"{path} adapts {own.model.name}, not {model}")
        return _Found(own, True, (own.card.task.kind,))
    if "tljax" in tensors.metadata:
        own = load_native(path, tensors, model, modules)
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
    card = Card(classes, name, "unknown", digest(local, "sha256"), identity.layout, notes)
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
