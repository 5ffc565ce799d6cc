"""Heads that classify by embeddings of their classes."""

from pathlib import Path

import numpy as np
import pytest
import tiny as tiny_network
from networks import difference, random_images, run

from tljax.models import select_outputs
from tljax.pretrained import Card, Pretrained, load_pretrained, save
from tljax.pretrained.embeddings import output_indices, read_embeddings, with_embeddings
from tljax.runtime.errors import RequestError

IMAGES = random_images(3, 16, 16)
NAMES = ("a cat", "a dog", "a bee", "an ant")


def tower() -> Pretrained:
    card = Card(("x", "y", "z"), "tower", "MIT", "0" * 64, "tljax")
    return Pretrained(tiny_network.MODEL, tiny_network.random_variables(), card)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(0).normal(0, 3, (4, 3)).astype(np.float32)
    np.savez(tmp_path / "texts.npz", names=NAMES, vectors=vectors, scale=20.0, bias=-2.0)
    return tmp_path / "texts.npz"


def test_logits_are_scaled_cosines(file: Path) -> None:
    model, variables, card = with_embeddings(tower(), read_embeddings(file))
    assert card.classes == NAMES
    outputs = np.asarray(run(tiny_network.MODEL, tiny_network.random_variables(), IMAGES).value)
    vectors = np.load(file)["vectors"]
    cosines = outputs @ vectors.T / np.linalg.norm(outputs, axis=1, keepdims=True)
    cosines /= np.linalg.norm(vectors, axis=1)
    assert difference(run(model, variables, IMAGES).value, 20 * cosines - 2) <= 1e-5


def test_the_features_of_a_backbone_are_compared_directly(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    np.savez(tmp_path / "texts.npz", names=["cat", "dog"], vectors=vectors)
    model, variables, card = tower()
    *body, head = model.stages
    backbone = model.__class__(
        "tiny", (*body, head._replace(module=head.module.clone(num_classes=0))), model.preprocess
    )
    trees = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "head"}}
    new = with_embeddings(
        Pretrained(backbone, trees, card), read_embeddings(tmp_path / "texts.npz")
    )
    assert new.model.stage_names == model.stage_names
    features = np.asarray(run(model, variables, IMAGES, stop="head").value)
    cosines = features @ vectors.T / np.linalg.norm(features, axis=1, keepdims=True)
    cosines /= np.linalg.norm(vectors, axis=1)
    assert difference(run(new.model, new.variables, IMAGES).value, 100 * cosines) <= 1e-5


def test_directions_of_several_sentences_are_averaged(tmp_path: Path) -> None:
    vectors = np.array([[[2.0, 0, 0], [0, 5, 0]], [[0, 0, 1], [0, 0, 3]]])
    np.savez(tmp_path / "texts.npz", names=["cat", "dog"], vectors=vectors)
    embeddings = read_embeddings(tmp_path / "texts.npz")
    np.testing.assert_allclose(embeddings.vectors, [[0.5, 0.5, 0], [0, 0, 1]])
    assert (embeddings.scale, embeddings.bias) == (100.0, 0.0)


def test_a_network_with_embeddings_survives_its_file(file: Path, tmp_path: Path) -> None:
    pretrained = with_embeddings(tower(), read_embeddings(file))
    save(tmp_path / "net.safetensors", pretrained)
    modules = {"Unit": tiny_network.Unit}
    loaded = load_pretrained(tmp_path / "net.safetensors", modules=modules)
    assert (loaded.model, loaded.card.classes) == (pretrained.model, NAMES)
    before, after = (run(*network[:2], IMAGES).value for network in (pretrained, loaded))
    np.testing.assert_array_equal(after, before)


def test_outputs_are_chosen_by_the_names_of_classes(file: Path) -> None:
    model, variables, card = with_embeddings(tower(), read_embeddings(file))
    indices = output_indices(card.classes, ("an ant", "a cat"))
    chosen = run(*select_outputs(model, variables, indices), IMAGES).value
    np.testing.assert_array_equal(chosen, run(model, variables, IMAGES).value[:, [3, 0]])
    with pytest.raises(RequestError, match=r"name 4 classes, but not a cow: add its vector"):
        output_indices(card.classes, ("a cow",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"names": ["a"]}, "lacks the array vectors"),
        ({"names": ["a"], "vectors": np.ones((2, 3))}, "names must be different, one for each"),
        ({"names": ["a", "a"], "vectors": np.ones((2, 3))}, "names must be different"),
        ({"names": ["a"], "vectors": np.ones(3)}, r"vectors must be finite numbers"),
        ({"names": ["a"], "vectors": np.full((1, 3), np.nan)}, r"vectors must be finite numbers"),
        ({"names": ["a"], "vectors": np.zeros((1, 3))}, "the vector of a has no direction"),
        ({"names": ["a"], "vectors": np.ones((1, 3)), "scale": -1}, "scale must be a number above"),
        ({"names": np.array(["a"], object), "vectors": np.ones((1, 3))}, "cannot be read as .npz"),
    ],
)
def test_a_damaged_file_is_one_line(arrays: dict, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(RequestError, match=message):
        read_embeddings(tmp_path / "x.npz")


def test_embeddings_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", names=["a"], vectors=np.ones((1, 4)))
    with pytest.raises(RequestError, match="returns 3 numbers, but the embeddings have 4"):
        with_embeddings(tower(), read_embeddings(tmp_path / "x.npz"))
    (tmp_path / "y.npz").write_text("names")
    with pytest.raises(RequestError, match=r"cannot be read as \.npz"):
        read_embeddings(tmp_path / "y.npz")
