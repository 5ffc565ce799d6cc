"""Weights in and out: a catalog name, a hub id, a file or a folder becomes a model, and back."""

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from tljax.models import (
    MODELS,
    Model,
    abstract_variables,
    build_model,
    with_head,
)
from tljax.models.spec import Modules, from_json, is_sound, to_json
from tljax.pretrained.catalog import CATALOG, Entry, catalog_name, default_classes
from tljax.pretrained.configs import read_architecture, read_configs, write_configs
from tljax.pretrained.fetch import fetch, fetch_hub, fetch_url
from tljax.pretrained.formats import (
    Tensors,
    read_tensors,
    sha256,
    write_keras,
    write_safetensors,
    write_torch,
)
from tljax.pretrained.keras_graph import read_graph
from tljax.pretrained.rules import Rule, Rules, apply_rules, compare, invert_rules, own_rules
from tljax.pretrained.tables.keras import layer_names
from tljax.pretrained.tables.layouts import LAYOUTS, Identity, check, identify, table
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Dtype
from tljax.runtime.trees import flatten
from tljax.runtime.types import NORMALIZATIONS, Preprocess, Variables


@dataclass(frozen=True)
class Card:
    """What travels with weights besides their preprocessing, which is the model's.

    Attributes:
        classes: a name for every logit; none for a backbone, which has no head.
        source: where the weights come from: a catalog name, hub id, URL or path.
        licence: SPDX identifier, or "unknown".
        sha256: of the file that was read; of the pretrained file for a fine-tuned network.
        layout: the keys that the file had: one of `LAYOUTS`, or ``tljax``.
        notes: remarks for a person on what was assumed, one line each; they are not saved.
    """

    classes: tuple[str, ...]
    source: str
    licence: str
    sha256: str
    layout: str
    notes: tuple[str, ...] = ()

    def index_of(self, name: str) -> int:
        """Return the logit of a class, by the class's name or, if none is called so, its index.

        Where the names themselves are numbers no index is taken, lest it be meant as a name.

        Raises:
            RequestError: there is no such class, or there are several; the message names the
                nearest, or their indices.
        """
        name, *classes = (unicodedata.normalize("NFC", each) for each in (name, *self.classes))
        found = [i for i, known in enumerate(classes) if known == name]
        found = found or [i for i, known in enumerate(classes) if known.lower() == name.lower()]
        is_index = name.isdecimal() and not all(known.isdecimal() for known in classes)
        if not found and is_index and int(name) < len(classes):
            return int(name)
        if len(found) == 1:
            return found[0]
        if found:  # ImageNet has two cranes and two maillots
            indices = " and ".join(map(str, found))
            raise RequestError(f"{len(found)} classes are called '{name}'; say which: {indices}")
        near = get_close_matches(name, classes, n=1)
        hint = f"did you mean {near[0]}?" if near else "`tljax.load_pretrained` lists card.classes"
        raise RequestError(f"no class is called '{name}' among {len(classes)}; {hint}")


class Pretrained(NamedTuple):
    """A model, its variables (float32, on the host) and their card."""

    model: Model
    variables: Variables
    card: Card

    def with_size(self, size: int | None) -> "Pretrained":
        """The same network for images of another size; None changes nothing."""
        if size is None:
            return self
        preprocess = self.model.preprocess.with_size(size)
        return self._replace(model=replace(self.model, preprocess=preprocess))

    def with_classes(self) -> "Pretrained":
        """Return the network as it is.

        Raises:
            RequestError: it is a backbone without a head, or has other outputs than classes.
        """
        outputs, names = self.model.num_classes, len(self.card.classes)
        if outputs and outputs != names:
            raise RequestError(
                f"{self.card.source} returns {outputs} numbers of an image and has {names} names "
                "of classes: it does not classify"
            )
        if not outputs:
            raise RequestError(
                f"{self.card.source} has no head, so it names no classes: it is a backbone; "
                "tljax train gives it a head for yours"
            )
        return self


def load_pretrained(
    weights: str | Path,
    *,
    model: str | None = None,
    normalization: str | None = None,
    modules: Modules | None = None,
) -> Pretrained:
    """Finds, reads and ports pretrained weights; format, architecture and depth are found out.

    Args:
        weights: a name of `CATALOG` (``resnet50.tv_in1k``, ``keras:VGG16``,
            ``torchvision:resnet50``); a Hugging Face hub id (``microsoft/resnet-50``,
            ``timm/resnet50.tv_in1k``); a file or its URL (safetensors, ``.pth``, ``.h5``,
            ``.keras``; also xz-compressed); a folder written by ``save_pretrained``; a run
            directory of ``tljax train``.
        model: the architecture that the weights must be; by default any. A bare file whose tensors
            fit two networks does not say which it is; a timm ResNet whose strides blur or average
            (resnetblur50, resnetaa50) has the tensors of ours, and only its config.json tells.
        normalization: of `NORMALIZATIONS`, what a bare file expects, which says nothing of it; by
            default what is usual for its architecture and format.
        modules: Flax classes by name, which a file of tljax needs where its network has stages of
            one's own: a file never imports anything.

    Returns:
        The model with the preprocessing that the weights expect. Its softmax is what the weights
        say of an image: of a head with one output, read as a sigmoid, it has two classes. Weights
        without a head make a backbone: ``num_classes`` is 0, and `apply` gives its features.

    Raises:
        RequestError: nothing is found under that name, it cannot be fetched, or does not fit, or
            fits two networks; it says of itself that it computes something that we do not build, or
            expects another normalization.
    """
    found, says_preprocess = _find(weights, model, modules)
    found = _with_two_classes(found)
    if normalization is None:
        return found
    if normalization not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise RequestError(f"there is no normalization '{normalization}'; choose from {known}")
    said = found.model.preprocess
    asked = said.with_normalization(normalization)
    if says_preprocess and asked != said:
        mean, std = (" ".join(f"{value:.4g}" for value in x) for x in (said.mean, said.std))
        raise RequestError(
            f"{found.card.source} expects {said.channel_order.upper()} less {mean}, over {std}, "
            f"which is not the normalization '{normalization}'; leave that out"
        )
    return found._replace(model=replace(found.model, preprocess=asked))


def _find(
    weights: str | Path, model: str | None, modules: Modules | None
) -> tuple[Pretrained, bool]:
    """The network, and whether its preprocessing was said with the weights."""
    if model is not None:
        build_model(model)  # a misspelt name is said before anything is fetched
    name = str(weights)
    if known := catalog_name(name):
        return _load_catalog(known, CATALOG[known], model), True
    if name.startswith(("https://", "http://")):
        return _load_file(fetch_url(name), name, model, modules)
    path = Path(weights)
    if path.is_dir():
        return _load_folder(path, name, model, modules)
    if path.exists():
        return _load_file(path, name, model, modules)
    beside = path.parent.name and path.parent.is_dir()
    if beside or name[:1] in (".", "~") or path.parent.name == "runs":  # no hub's
        near = get_close_matches(path.name, [x.name for x in path.parent.glob("*")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RequestError(f"{name} does not exist{hint}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (".safetensors", ".pth"):
        return _load_folder(fetch_hub(name), name, model, modules)
    hint = "`tljax weights list` prints the known names"
    if name.lower().startswith("keras:"):  # few, and much alike
        hint = f"known names: {', '.join(key for key in CATALOG if key.startswith('keras:'))}"
    elif near := get_close_matches(
        name, [*CATALOG, *(f"{m}.tv_in1k" for m in MODELS)], n=1, cutoff=0.5
    ):
        hint = f"did you mean {near[0]}?"
    raise RequestError(f"no weights are called '{name}' and no such file exists; {hint}")


def _with_two_classes(found: Pretrained) -> Pretrained:
    """A sigmoid of one logit is the softmax of it and of 0."""
    model, variables, card = found
    if not model.has_linear_head or model.num_classes != 1:
        return found
    model, name = with_head(model, 2), model.stage_names[-1]
    head = {k: np.insert(leaf, 0, 0, axis=-1) for k, leaf in variables["params"][name].items()}
    [known] = card.classes
    classes = default_classes(2) if card.classes == default_classes(1) else (f"not {known}", known)
    note = f"{card.source}: its one output is taken for the logit of '{classes[1]}', by a sigmoid"
    return Pretrained(
        model,
        {**variables, "params": {**variables["params"], name: head}},
        replace(card, classes=classes, notes=(*card.notes, note)),
    )


def _load_catalog(name: str, entry: Entry, model: str | None) -> Pretrained:
    if model not in (None, entry.model):
        raise RequestError(f"{name} holds {entry.model}, not {model}")
    path = fetch(name)
    load = _load_folder if path.is_dir() else _load_file
    loaded, says_preprocess = load(path, name, entry.model)
    preprocess = loaded.model.preprocess if says_preprocess else entry.preprocess
    card = replace(loaded.card, licence=entry.licence)
    return Pretrained(replace(loaded.model, preprocess=preprocess), loaded.variables, card)


def _load_folder(
    folder: Path, name: str, model: str | None, modules: Modules | None = None
) -> tuple[Pretrained, bool]:
    """A run directory, or what ``save_pretrained`` of transformers or timm writes."""
    if (folder / "best" / "model.safetensors").exists():
        return _load_file(folder / "best" / "model.safetensors", name, model, modules)
    files = [folder / file for file in _WEIGHT_FILES if (folder / file).exists()]
    if not files and (folder / "config.json").exists() and (folder / "checkpoints").is_dir():
        raise RequestError(
            f"{folder} is a run that is not finished; first go on with it: "
            f"tljax train --resume {shlex.quote(str(folder))}"
        )
    if not files:
        expected = ", ".join(_WEIGHT_FILES)
        raise RequestError(f"{folder} is neither a run directory nor a saved model: no {expected}")
    architecture = read_architecture(folder)
    loaded, says_all = _load_file(files[0], name, model or architecture, modules)
    if says_all:
        return loaded, True
    said = read_configs(folder, loaded.model)
    notes = loaded.card.notes + said.notes
    found = Pretrained(
        replace(loaded.model, preprocess=said.preprocess or loaded.model.preprocess),
        loaded.variables,
        replace(loaded.card, classes=said.classes, licence=said.licence, notes=notes),
    )
    return found, said.preprocess is not None


_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _load_file(
    path: Path, name: str, model: str | None, modules: Modules | None = None
) -> tuple[Pretrained, bool]:
    tensors = read_tensors(path)
    if "tljax" in tensors.metadata:  # our own files say everything themselves
        return _load_native(path, tensors, model, modules), True
    graph = tensors.metadata.get("keras")
    if graph:
        found, rules = _identify_keras(tensors.arrays, name, model, graph)
    else:
        found = check(tensors.arrays, name, model)
        rules = table(found.model, found.layout)
    variables = _fill(rules, found.arrays, abstract_variables(found.model), name)
    classes = default_classes(found.model.num_classes)
    notes = found.notes(name) + (_twins(found, name) if model is None else ())
    card = Card(classes, name, "unknown", sha256(path), found.layout, notes)
    if graph:
        built, says_preprocess = read_graph(graph, name, found.model)
        return Pretrained(built, variables, card), says_preprocess
    return Pretrained(found.model, variables, card), False


def _fill(
    rules: Rules, arrays: Mapping[str, np.ndarray], skeleton: Variables, where: str
) -> Variables:
    try:
        return apply_rules(rules, arrays, skeleton)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _identify_keras(
    arrays: Mapping[str, np.ndarray], where: str, model: str | None, graph: str
) -> tuple[Identity, Rules]:
    """A whole model of Keras, whose head may be a Dense layer of any network, without bias too."""
    dense = {key.partition("/")[0]: a for key, a in arrays.items() if key.startswith("dense")}
    biases = {f"{layer}/bias": np.zeros(a.shape[-1], np.float32) for layer, a in dense.items()}
    arrays = biases | dict(arrays)
    try:
        found = check(arrays, where, model)
        return found, table(found.model, found.layout)
    except RequestError:
        backbone = {key: a for key, a in arrays.items() if key.partition("/")[0] not in dense}
        found = identify(backbone, model)
        if found.difference.leftover and not found.difference.missing:
            read_graph(graph, where, found.model)  # names the first layer that is one too many
        if not dense or any(found.difference):
            raise
        *_, head = dense
    built = with_head(found.model, arrays[f"{head}/bias"].size)
    read_graph(graph, where, built)  # names the layer that is one too many
    rules = table(found.model, found.layout)
    rules += tuple(Rule(f"{head}/{leaf}", f"params/head/{leaf}") for leaf in ("kernel", "bias"))
    difference = compare(rules, arrays, abstract_variables(built))
    if any(difference):
        raise RequestError(f"{where} does not fit {built.name} with a new head: {difference}")
    return found._replace(model=built, arrays=arrays), rules


def _twins(found: Identity, where: str) -> tuple[str, ...]:
    """A word on the other networks that have the same tensors; if we have them, an error."""
    name = found.model.name
    twins = LAYOUTS[name][found.layout].twins(name)
    if known := [twin for twin in twins if twin in MODELS]:
        raise RequestError(
            f"{where} has the tensors of {name} and of {' and '.join(known)}, which compute "
            f"different things; say which it is: --model {' or --model '.join((name, *known))} "
            "(model= in Python)"
        )
    if not twins:
        return ()
    note = (
        f"{where} is taken for {name}; its tensors fit {' and '.join(twins)} as well, which tljax "
        f"does not build (pass --model {name} if it is none)"
    )
    return (note,)


# --- our own format: safetensors whose keys are our paths, with the card in the header -----------


_VERSION = 2


def _load_native(
    path: Path, tensors: Tensors, model: str | None, modules: Modules | None
) -> Pretrained:
    try:
        header = json.loads(tensors.metadata["tljax"])
        classes = tuple(map(str, header["card"]["classes"]))
        card = Card(**{**header["card"], "classes": classes, "notes": ()})
        version = int(header.get("version", 1))
        built = _first_version(header, len(classes)) if version == 1 else None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{path}: its tljax header is damaged ({error!r:.200}); write or fetch the file again"
        ) from error
    if version > _VERSION:
        raise RequestError(
            f"{path} is of version {version} of tljax's format, and this tljax reads up to "
            f"{_VERSION}: upgrade it"
        )
    try:
        built = built or from_json(header.get("model"), modules)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    if model not in (None, built.name):
        raise RequestError(f"{path} holds {built.name}, not {model}")
    expected = abstract_variables(built)
    rules = own_rules(tensors.arrays, expected, f"{path} does not fit {built.name}")
    return Pretrained(built, _fill(rules, tensors.arrays, expected, str(path)), card)


def _first_version(header: dict[str, Any], num_classes: int) -> Model:
    """Build what a header without a version describes: an architecture with a linear head."""
    of_image = {key: tuple(header["preprocess"][key]) for key in ("mean", "std")}
    preprocess = Preprocess(**{**header["preprocess"], **of_image})
    # The first files had neither of these.
    dtype = np.dtype(header.get("dtype", "float32")).name
    dropout = float(header.get("dropout", 0))
    after = None if header.get("head_after") is None else str(header["head_after"])
    if not (is_sound(preprocess) and 0 <= dropout < 1 and dtype in get_args(Dtype)):
        raise ValueError((preprocess, dtype, dropout))
    whole = build_model(str(header["model"]))
    built = with_head(whole, num_classes, after=after, dropout=dropout)
    return replace(built, preprocess=preprocess, dtype=dtype)


def save(path: Path, pretrained: Pretrained) -> None:
    """Writes tljax's own format: one safetensors file that `load_pretrained` needs alone.

    The model comes back equal, whatever its stages; see `tljax.models.spec`.

    Raises:
        RequestError: a setting of a stage cannot be written down, or the variables do not fit.
    """
    model, variables, card = pretrained
    about = {**asdict(card), "layout": "tljax"}
    del about["notes"]
    header = {"version": _VERSION, "model": to_json(model), "card": about}
    flat = {key: np.asarray(value) for key, value in flatten(variables).items()}
    misfit = f"{path} is not written, as its variables do not fit {model.name}"
    own_rules(flat, abstract_variables(model), misfit)
    write_safetensors(path, flat, {"tljax": json.dumps(header)})


# --- export to other layouts --------------------------------------------------------------------


def export(path: Path, pretrained: Pretrained, layout: str) -> None:
    """Writes a network for other programs, by the same tables that read theirs.

    Args:
        path: ``.safetensors`` or ``.pth``; for ``huggingface`` a folder that
            ``from_pretrained`` of transformers reads; for ``keras`` a file that ``load_weights``
            of Keras reads, ``.weights.h5`` or ``.h5``.
        pretrained: what to write.
        layout: one of the model's `LAYOUTS`, or ``tljax``.

    Raises:
        RequestError: the model has no such layout, it lacks stages, or the file name has no known
            suffix.
    """
    model, variables, card = pretrained
    if layout == "tljax":
        return save(path, pretrained)
    rules, whole = table(model, layout), build_model(model.name)
    linear = model.has_linear_head or not model.num_classes
    cuts = (None,) if model.num_classes else (None, *whole.stage_names[:-1])
    held = [with_head(whole, model.num_classes, after=after).stages for after in cuts]
    if not linear or with_head(model, model.num_classes).stages not in held:
        raise RequestError(
            f"the {layout} layout holds a {model.name} with all its stages and a linear head, "
            "which this one is not; export it as tljax, stablehlo or onnx"
        )
    arrays = invert_rules(rules, jax.device_get(variables))
    if layout == "huggingface":
        write_safetensors(path / "model.safetensors", arrays, {"format": "pt"})
        write_configs(path, model, card.classes)
    elif layout == "keras":
        if path.suffix != ".h5":
            raise RequestError(f"Keras reads no {path.name}; end it in .weights.h5 or .h5")
        write_keras(path, arrays, layer_names(model.name))
    elif path.suffix == ".safetensors":
        write_safetensors(path, arrays, {"format": "pt"})
    elif path.suffix in (".pth", ".pt", ".bin"):
        write_torch(path, arrays)
    else:
        raise RequestError(f"cannot tell the format of {path}; end it in .safetensors or .pth")
    return None
