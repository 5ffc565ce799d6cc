"""Every row of the catalog is valid."""

import csv
import re
from importlib.resources import files

from tljax.models import MODELS, build_model
from tljax.pretrained import CATALOG
from tljax.runtime.types import NORMALIZATIONS


def rows() -> list[dict[str, str]]:
    text = files("tljax.pretrained").joinpath("catalog.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


def test_every_row_has_valid_values():
    for row in rows():
        assert row["model"] in MODELS
        assert row["interpolation"] in ("bilinear", "bicubic")
        assert row["normalization"] in NORMALIZATIONS
        assert row["source"].startswith(("https://", "hub:", "package:"))
        assert re.fullmatch(r"(sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{32})?", row["digest"])
        assert 0 < int(row["size"]) <= int(row["resize"])
        assert not row["top1"] or 40 < float(row["top1"]) < 90


def test_names_are_unique_regardless_of_case():
    names = [row["name"].lower() for row in rows()]
    assert len(set(names)) == len(names) == len(CATALOG)


def test_digests_agree_with_the_hashes_in_file_names():
    for entry in CATALOG.values():
        match = re.search(r"-([0-9a-f]{8,9})\.pth$", entry.source)
        if match:
            assert entry.digest.startswith(f"sha256:{match[1]}"), entry.source


def test_weights_of_timm_use_the_default_preprocessing_of_their_network():
    """Except for the ResNets, which timm tests at other sizes."""
    entries = [
        entry
        for entry in CATALOG.values()
        if "/v0.1-weights/" in entry.source and not entry.model.startswith("resnet")
    ]
    assert len(entries) == 15
    for entry in entries:
        assert entry.preprocess == build_model(entry.model).preprocess
