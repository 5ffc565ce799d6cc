"""The table of published weights: every row is one that the code can use."""

import csv
import re
from importlib.resources import files

from tljax.models import MODELS, build_model
from tljax.pretrained import CATALOG
from tljax.runtime.types import NORMALIZATIONS


def rows() -> list[dict[str, str]]:
    text = files("tljax.pretrained").joinpath("catalog.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


def test_every_row_names_what_exists():
    for row in rows():
        assert row["model"] in MODELS
        assert row["interpolation"] in ("bilinear", "bicubic")
        assert row["normalization"] in NORMALIZATIONS
        assert row["source"].startswith(("https://", "hub:", "package:"))
        assert re.fullmatch(r"(sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{32})?", row["digest"])
        assert 0 < int(row["size"]) <= int(row["resize"])
        assert 40 < float(row["top1"]) < 90


def test_no_two_rows_have_one_name_in_any_case():
    names = [row["name"].lower() for row in rows()]
    assert len(set(names)) == len(names) == len(CATALOG)


def test_a_hash_in_the_name_of_a_file_is_the_published_one():
    for entry in CATALOG.values():
        named = re.search(r"-([0-9a-f]{8,9})\.pth$", entry.source)
        if named:
            assert entry.digest.startswith(f"sha256:{named[1]}"), entry.source


def test_weights_of_timm_expect_what_their_network_expects_by_default():
    """But for its ResNets, which it tests at sizes of their own."""
    found = [
        entry
        for entry in CATALOG.values()
        if "/v0.1-weights/" in entry.source and not entry.model.startswith("resnet")
    ]
    assert len(found) == 15
    for entry in found:
        assert entry.preprocess == build_model(entry.model).preprocess
