"""Rows of pictures, for a small network."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from networks import random_variables
from PIL import Image

from tljax.explain import mean_square
from tljax.models import apply, vit
from tljax.pretrained import Card, Pretrained
from tljax.report.gallery import open_output
from tljax.runtime.errors import RequestError
from tljax.runtime.files import MARKER
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.task import Task
from tljax.studies.pictures import (
    Photographs,
    _default_classes,
    _features_of,
    _scores,
    channel_pictures,
    dream_pictures,
    explanation_pictures,
    feature_pictures,
    ideal_pictures,
    read_photographs,
    spatial_stages,
)


@pytest.fixture(scope="module")
def network() -> Pretrained:
    card = Card(("ant", "bee", "cat"), "somewhere", "MIT", "0" * 64, "torchvision")
    variables = jax.tree.map(np.array, tiny.random_variables())
    return Pretrained(tiny.MODEL, variables, card)


@pytest.fixture(scope="module")
def photographs(network, tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return read_photographs(network, [str(folder)])[0]


@pytest.fixture(scope="module")
def transformer(network) -> Pretrained:
    """Patches of 4 x 4 pixels in images of 16 x 16."""
    model = vit.build("tiny_vit", vit.Variant(12, 1, 2, patch=4, size=16, registers=2), 3)
    model = replace(model, preprocess=Preprocess(16, 16))
    return Pretrained(model, random_variables(model), network.card)


def assert_rows(rows, shape) -> None:
    pictures = [picture for row in rows for picture in row]
    assert (len(rows), len(rows[0])) == shape
    assert len({picture.name for picture in pictures}) == len(pictures)
    assert not any("/" in picture.name or " " in picture.name for picture in pictures)
    assert all(picture.pixels.dtype == np.uint8 for picture in pictures)
    assert all(picture.pixels.ndim == 3 for picture in pictures)


@pytest.mark.slow
def test_a_class_is_synthesized_in_four_ways(network):
    rows = ideal_pictures(network, ["BEE", "2"], num_steps=60, tv_weight=0.02)
    assert_rows(rows, (2, 4))
    assert [row[0].caption.split("\n")[0] for row in rows] == ["bee", "cat"]
    pixels, pixels_tv, fourier, fourier_tv = rows[0]
    assert fourier.name == "1-fourier"
    assert fourier_tv.name == "1-fourier-tv"
    for rough, smooth in ((pixels, pixels_tv), (fourier, fourier_tv)):
        variation = [
            sum(np.abs(np.diff(p.pixels / 255, axis=axis)).sum() for axis in (0, 1))
            for p in (rough, smooth)
        ]
        assert variation[1] < 0.8 * variation[0]
        assert smooth.caption.endswith(f"TV {variation[1]:.0f}")
        assert "total variation" in smooth.caption
        assert "total variation" not in rough.caption
    again = ideal_pictures(network, ["bee"], num_steps=60, tv_weight=0.02, seed=1)
    assert (again[0][2].pixels != fourier.pixels).any()


@pytest.mark.slow
def test_five_methods_explain_each_photograph(network, photographs):
    rows = explanation_pictures(network, photographs)
    assert_rows(rows, (2, 6))
    for number, (photograph, *explained) in enumerate(rows):
        assert photograph.name == f"{number}-photograph"
        name, answer, _ = photograph.caption.split("\n")
        assert name.endswith(f"{number}.png")
        assert answer in network.card.classes
        assert [picture.caption for picture in explained][::3] == ["saliency", "Grad-CAM"]
        assert len({picture.pixels.tobytes() for picture in explained}) == 5
    other = explanation_pictures(network, photographs, target="ant")
    assert all("\nant\np " in row[0].caption for row in other)


def test_every_stage_with_a_feature_map_has_one_row_per_photograph(network, photographs):
    rows = feature_pictures(network, photographs, count=5)
    assert_rows(rows, (4, 5))
    assert [row[0].name[:-1].rstrip("0123456789") for row in rows] == [
        "0-stem-", "0-layer1-", "1-stem-", "1-layer1-",
    ]  # fmt: skip
    assert rows[1][0].pixels.shape == (8, 8, 3)
    assert spatial_stages(network.model) == ("stem", "layer1")


def test_a_row_holds_the_photograph_and_its_dream(network, photographs):
    rows = dream_pictures(network, photographs, stage="stem", num_steps=2)
    assert_rows(rows, (2, 2))
    assert rows[0][1].name == "0-stem"
    assert (rows[0][0].pixels != rows[0][1].pixels).any()


def test_channels_are_synthesized_in_one_row(network):
    rows = channel_pictures(network, [0, 11], num_steps=2)
    assert_rows(rows, (1, 2))
    assert [picture.name for picture in rows[0]] == ["layer1-0", "layer1-11"]


@pytest.mark.slow
def test_tokens_of_a_transformer_are_pictured_as_maps(transformer, photographs):
    rows = feature_pictures(transformer, photographs[:1], count=2)
    assert [row[0].name.split("-")[1] for row in rows] == ["embed", "block1", "norm"]
    assert {picture.pixels.shape for row in rows for picture in row} == {(4, 4, 3)}


@pytest.mark.slow
def test_patches_of_a_transformer_are_explained(transformer, photographs):
    *_, grad_cam, _ = explanation_pictures(transformer, photographs[:1])[0]
    assert grad_cam.name == "0-grad-cam"
    assert np.ptp(grad_cam.pixels, axis=(0, 1)).max() > 50  # not zero everywhere


@pytest.mark.slow
def test_a_transformer_dreams_at_sizes_that_its_patches_divide(transformer, photographs):
    """Without rounding the sizes would be 8, 11 and 16, and patches have 4 pixels."""
    before, after = dream_pictures(transformer, photographs[:1], stage="block1", num_steps=2)[0]
    assert after.name == "0-block1"
    features_fn, _ = _features_of(transformer, "block1")
    objective = jax.jit(mean_square(partial(features_fn, transformer.variables)))
    values = objective(np.stack([before.pixels, after.pixels]) / np.float32(255))
    assert float(values[1]) > 1.01 * float(values[0])


def test_unreadable_photographs_are_named_and_the_others_are_read(network, tmp_path):
    Image.new("RGB", (20, 24), "red").save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<html>")
    [(name, pixels)], skipped = read_photographs(network, [str(tmp_path)])
    assert (name, pixels.shape) == ("good.png", (16, 16, 3))
    assert (pixels == [255, 0, 0]).all()
    assert skipped == {
        str(tmp_path / "empty.png"): "the file is empty",
        str(tmp_path / "page.png"): "an HTML page, not an image",
    }
    with pytest.raises(RequestError, match=r"no image can be read; .*empty.png: the file is empty"):
        read_photographs(network, [str(tmp_path / "empty.png")])


def test_a_folder_of_pictures_is_not_read_as_data_and_may_not_hold_photographs(tmp_path):
    (tmp_path / "data" / "cats").mkdir(parents=True)
    (tmp_path / "data" / "cats" / "1.JPG").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1.txt").touch()
    for name in ("new/deep", "notes", "notes"):
        open_output(tmp_path / name)
    for name in ("data", "data/cats"):
        with pytest.raises(RequestError, match=r"holds images, .*cats/1\.JPG: choose"):
            open_output(tmp_path / name)
    assert sorted(path.parent.name for path in tmp_path.rglob(MARKER)) == ["deep", "notes"]


def test_unknown_names_are_refused_in_one_line(network, photographs):
    with pytest.raises(RequestError, match="layer1 has no channel 12: choose from 0 to 11"):
        channel_pictures(network, [3, 12])
    with pytest.raises(
        RequestError, match="output of pool is not a feature map: choose from stem, lay"
    ):
        dream_pictures(network, photographs, stage="pool")
    with pytest.raises(RequestError, match="tiny has no stage 'layer9'"):
        dream_pictures(network, photographs, stage="layer9")
    with pytest.raises(RequestError, match="no class is called 'ante' among 3; did you mean ant"):
        explanation_pictures(network, photographs, target="ante")
    with pytest.raises(RequestError, match="name at least one file"):
        read_photographs(network, [])
    with pytest.raises(RequestError, match="name at least one channel"):
        channel_pictures(network, [])
    with pytest.raises(RequestError, match="cannot show 0 channels per stage"):
        feature_pictures(network, photographs, count=0)


def told(rows) -> list[str]:
    """Return the name and value of each row, without the file."""
    return [", ".join(row[0].caption.split("\n")[1:]) for row in rows]


LABELS = Task("multilabel", thresholds=(0.4, 0.5, 0.6))
NUMBERS = Task("regression", mean=(40.0, 0.0, 7.0), scale=(10.0, 1.0, 2.0), units=("y", "kg", ""))
ORDER = Task("ordinal")


def of_task(network: Pretrained, task: Task) -> Pretrained:
    """Return the network with three outputs, of four classes if they are ordered."""
    classes = network.card.classes + (("dog",) if task.kind == "ordinal" else ())
    return network._replace(card=replace(network.card, task=task, classes=classes))


@pytest.mark.parametrize("task", [LABELS, NUMBERS, ORDER], ids=lambda task: task.kind)
def test_labels_numbers_and_ordered_classes_are_explained(network, photographs, task):
    network = of_task(network, task)
    images = np.stack([pixels for _, pixels in photographs])
    outputs = np.asarray(apply(network.model, network.variables, images).logits)
    decoded = task.decode(outputs)
    rows = explanation_pictures(network, photographs)
    assert_rows(rows, (2, 6))
    best = [0, 0] if task is NUMBERS else decoded.argmax(1)
    units = {0: " y", 1: " kg", 2: "", 3: ""} if task is NUMBERS else dict.fromkeys(range(4), "")
    form = "{:.4g}" if task is NUMBERS else "p {:.3f}"
    assert told(rows) == [
        f"{network.card.classes[i]}, {form.format(row[i])}{units[i]}"
        for i, row in zip(best, decoded, strict=True)
    ]
    last = network.card.classes[-1]
    other = explanation_pictures(network, photographs, target=last)
    assert all(caption.startswith(f"{last}, ") for caption in told(other))
    assert (other[0][1].pixels != rows[0][1].pixels).any()


@pytest.mark.parametrize(
    "task",
    [LABELS, NUMBERS, pytest.param(ORDER, marks=pytest.mark.slow)],
    ids=lambda task: task.kind,
)
def test_the_default_ideals_are_the_first_two_and_have_high_values(network, photographs, task):
    network = of_task(network, task)
    rows = ideal_pictures(network, num_steps=30)
    assert [row[0].name for row in rows] == ["0-pixels", "1-pixels"]
    assert rows[0][0].caption.startswith("ant\n")
    images = np.stack([pixels for _, pixels in photographs] + [row[0].pixels for row in rows])
    scores = np.asarray(_scores(network, network.variables, images))
    for i in range(2):
        assert scores[2 + i, i] > scores[:2, i].max()


def test_the_scores_of_ordered_classes_rank_them_as_probabilities_do(network):
    network = of_task(network, ORDER)
    bias = network.variables["params"]["head"]["bias"]
    for level in (-3.0, -1.0, 1.0, 3.0):
        descending = np.array([1.0, 0.0, -1.0], np.float32) * 2 + level
        network.variables["params"]["head"]["bias"] = descending
        features = np.zeros((1, 12), np.float32)
        scores = np.asarray(_scores(network, network.variables, features, start="head"))
        expected = ORDER.decode(descending[None])
        assert scores.shape == (1, 4)
        assert scores.argmax() == expected.argmax()
        # The product of the two probabilities is at least their overlap.
        assert (np.exp(scores) >= expected - 1e-6).all()
    network.variables["params"]["head"]["bias"] = bias


def test_siamese_cat_and_zebra_are_the_default_where_they_are_known():
    card = Card(("ant", "zebra", "Siamese cat"), "somewhere", "MIT", "0" * 64, "torchvision")
    assert _default_classes(card) == [2, 1]
    assert _default_classes(replace(card, classes=("ant", "bee", "cat"))) == [0, 1]
    assert _default_classes(replace(card, classes=("age",))) == [0]
