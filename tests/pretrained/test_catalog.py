"""Every row of the catalog is valid, and agrees with the packages that publish the weights."""

import re
from collections.abc import Callable, Iterator

import make_catalog
import pytest

from tljax.commands import weights
from tljax.models import MODELS, build_model
from tljax.pretrained import CATALOG
from tljax.pretrained.catalog import Row, catalog_name, read_rows
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import NORMALIZATIONS


def rows() -> list[Row]:
    return [*read_rows("catalog.csv"), *read_rows("catalog_generated.csv")]


def test_every_row_has_valid_values():
    for row in rows():
        assert row["model"] in MODELS
        assert row["interpolation"] in ("bilinear", "bicubic")
        assert row["normalization"] in NORMALIZATIONS
        assert row["source"].startswith(("https://", "hub:", "package:"))
        assert re.fullmatch(r"(sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{32})?", row["digest"])
        assert row["licence"]
        assert 0 < int(row["size"]) <= int(row["resize"])
        assert int(row["classes"]) >= 0
        assert not row["top1"] or 40 < float(row["top1"]) < 90


def test_names_are_unique_regardless_of_case():
    names = [row["name"].lower() for row in rows()]
    assert len(set(names)) == len(names) == len(CATALOG)


def test_what_is_unknown_is_empty():
    entry = CATALOG["regnety_120.sw_in12k"]
    assert (entry.classes, entry.top1, entry.digest) == (11821, None, "")
    assert CATALOG["regnety_320.seer"].classes == 0
    assert CATALOG["tf_mobilenetv1_100.google_in1k"].classes == 1001


def test_networks_with_two_names_in_timm_and_several_sizes_in_torchvision_have_rows():
    assert CATALOG["vit_base_patch16_dinov3.lvd1689m"].licence == "dinov3-license"
    for name, expected in (
        ("torchvision:vit_b_16", "vit_base_patch16_224.tv_in1k"),
        ("torchvision:vit_b_16.swag_linear", "vit_base_patch16_224.tv_swag_linear_in1k"),
        ("torchvision:vit_b_16.swag_e2e", "vit_base_patch16_384.tv_swag_e2e_in1k"),
    ):
        assert catalog_name(name) == expected
        size = CATALOG[expected].preprocess.size
        assert size == build_model(CATALOG[expected].model).preprocess.size


def test_the_list_of_weights_is_filtered_by_a_part_of_the_name(
    capsys: pytest.CaptureFixture[str],
):
    listed = weights.run(weights.List(name="DINOv3"))["weights"]
    assert {name for name in CATALOG if "dinov3" in name} == set(listed)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(listed)
    with pytest.raises(RequestError, match="no name of the catalog contains 'nosuch'"):
        weights.run(weights.List(name="nosuch"))


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


def test_the_generated_rows_are_what_timm_and_torchvision_state():
    expected = make_catalog.rows()
    assert read_rows("catalog_generated.csv") == expected, "run `python tests/make_catalog.py`"


def test_the_rows_typed_by_hand_agree_with_torchvision():
    """Except for Inception, which itself undoes the normalization of its transform."""
    count = 0
    for row, stated in both(make_catalog.torchvision_rows):
        count += 1
        for column in COLUMNS | {"source", "digest", "size", "resize", "top1"}:
            inception = column == "normalization" and row["model"] == "inception_v3"
            assert inception or row[column] == stated[column], (row["name"], column)
    assert count >= 31


def test_the_rows_typed_by_hand_agree_with_timm():
    """Except for sizes, because timm tests some networks at larger ones."""
    count = 0
    for row, stated in both(make_catalog.timm_rows):
        if ".tv" not in row["name"]:  # for which torchvision's word counts
            count += 1
            for column in COLUMNS | {"licence"}:
                assert row[column] == stated[column], (row["name"], column)
    assert count >= 31


COLUMNS = {"model", "interpolation", "normalization", "classes"}


def both(stated_rows: Callable[[str], Iterator[Row]]) -> list[tuple[Row, Row]]:
    """Return the rows that are typed by hand and stated by a package."""
    stated = {row["name"]: row for model in MODELS for row in stated_rows(model)}
    hand = read_rows("catalog.csv")
    return [(row, stated[row["name"]]) for row in hand if row["name"] in stated]
