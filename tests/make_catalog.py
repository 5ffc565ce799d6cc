"""Write the part of the catalog that the installed timm and torchvision state.

python tests/make_catalog.py

There is a row for every published set of weights of every network of tljax, except those whose
names are in catalog.csv, which is typed by hand, and those whose preprocessing tljax does not have,
such as a resize that changes the aspect ratio. What the packages do not state stays empty.
"""

import csv
import io
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import oracles

from tljax.models import MODELS
from tljax.models.vit import VARIANTS
from tljax.pretrained.catalog import TORCHVISION_NAMES, Row, read_rows, torchvision_tag
from tljax.pretrained.configs import alternatives
from tljax.pretrained.tables.layouts import LAYOUTS
from tljax.runtime.files import atomic_write
from tljax.runtime.preprocess import Preprocess

FOLDER = Path(__file__).parents[1] / "tljax" / "pretrained"

_SPDX = {
    "apache-2.0": "Apache-2.0",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "mit": "MIT",
}


def licence(cfg: Any) -> str:
    """Return the license in a configuration of timm as the catalog writes it."""
    return _SPDX.get(cfg.license, cfg.license) or "other"


def _row(name: str, model: str, source: str, preprocess: Preprocess, **others: Any) -> Row | None:
    """Return a row, or None if tljax does not have its preprocessing."""
    normalization, interpolation = preprocess.normalization, preprocess.interpolation
    if normalization is None or interpolation not in ("bilinear", "bicubic"):
        return None
    match = re.search(r"-([0-9a-f]{8,64})\.pth$", source)
    row = {
        "name": name,
        "model": model,
        "source": source,
        "digest": f"sha256:{match[1]}" if match else "",
        "size": preprocess.size,
        "resize": preprocess.resize,
        "interpolation": interpolation,
        "normalization": normalization,
        **others,
    }
    return {key: str(value) for key, value in row.items()}


def timm_rows(model: str) -> Iterator[Row]:
    """Yield the rows of the weights that timm publishes on the Hugging Face hub."""
    if "timm" not in LAYOUTS[model]:
        return
    timm: Any = oracles.load("timm")
    architecture, *_ = alternatives(LAYOUTS[model]["timm"].config(model).get("architecture", model))
    for name in timm.list_pretrained(f"{architecture}.*"):
        cfg = timm.models.get_pretrained_cfg(name)
        _, height, width = cfg.input_size
        if not cfg.hf_hub_id or cfg.crop_mode != "center" or height != width:
            continue
        resize = math.floor(height / cfg.crop_pct)
        preprocess = Preprocess(height, resize, cfg.interpolation, cfg.mean, cfg.std)
        tag = name.removeprefix(architecture)
        others = {"licence": licence(cfg), "top1": "", "classes": cfg.num_classes}
        if row := _row(f"{model}{tag}", model, f"hub:{cfg.hf_hub_id}", preprocess, **others):
            yield row


def torchvision_rows(model: str) -> Iterator[Row]:
    """Yield the rows of the weights that torchvision publishes; only timm names their license."""
    models: Any = oracles.load("torchvision.models")
    name = {ours: name for name, ours in TORCHVISION_NAMES.items()}.get(model, model)
    theirs = name.partition(".")[0]
    if "torchvision" not in LAYOUTS[model] or theirs not in models.list_models():
        return
    licences = _licences()
    for weights in models.get_model_weights(theirs):
        if weights.meta["categories"] is None:  # a part of a network, without its head
            continue
        transform = weights.transforms()
        [size], [resize] = transform.crop_size, transform.resize_size
        if model in VARIANTS and size != VARIANTS[model].size:  # positions of another size
            continue
        statistics = tuple(transform.mean), tuple(transform.std)
        preprocess = Preprocess(size, resize, transform.interpolation.value, *statistics)
        others = {
            "licence": licences.get(weights.url, "other"),
            "top1": f"{weights.meta['_metrics']['ImageNet-1K']['acc@1']:.3f}",
            "classes": len(weights.meta["categories"]),
        }
        name = f"{model}.{torchvision_tag(weights.name)}"
        if row := _row(name, model, weights.url, preprocess, **others):
            yield row


@cache
def _licences() -> dict[str, str]:
    """Return the licenses that timm names, by the URLs of the files."""
    timm: Any = oracles.load("timm")
    cfgs = map(timm.models.get_pretrained_cfg, timm.list_pretrained())
    return {cfg.url: licence(cfg) for cfg in cfgs if cfg.url}


def rows() -> list[Row]:
    """Return all rows, in the order of `MODELS`; of two with one name, that of torchvision."""
    names = {row["name"].lower() for row in read_rows("catalog.csv")}
    found = []
    for model in MODELS:
        for row in (*torchvision_rows(model), *timm_rows(model)):
            if row["name"].lower() not in names:
                names.add(row["name"].lower())
                found.append(row)
    return found


if __name__ == "__main__":
    text = io.StringIO()
    writer = csv.DictWriter(text, read_rows("catalog.csv")[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows())
    with atomic_write(FOLDER / "catalog_generated.csv") as temporary:
        temporary.write_text(text.getvalue(), "utf-8")
