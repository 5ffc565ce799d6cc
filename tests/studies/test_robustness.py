"""Robustness of a small network: accuracies, captions and pictures."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from tljax.data.folders import open_folder
from tljax.data.options import Loading
from tljax.models import apply
from tljax.pretrained import Card, Pretrained
from tljax.report.gallery import write_attack_pictures
from tljax.runtime.errors import RequestError
from tljax.studies import robustness as attacks

pytestmark = pytest.mark.usefixtures("quick_to_compile")
LOADING = Loading(batch_size=4)


@jax.jit
def seen(variables, images: np.ndarray) -> jax.Array:
    return apply(tiny.MODEL, variables, images).logits


@pytest.fixture(scope="module")
def network() -> Pretrained:
    card = Card(("ant", "bee", "cat"), "somewhere", "MIT", "0" * 64, "torchvision")
    variables = jax.tree.map(np.array, tiny.random_variables())
    # Every class is the prediction for some image.
    noise = np.random.default_rng(1).uniform(0, 1, (20, 16, 16, 3)).astype("f")
    variables["params"]["head"]["bias"] -= np.asarray(seen(variables, noise)).mean(0)
    return Pretrained(tiny.MODEL, variables, card)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(6):
        path = folder / ("bee", "cat")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    (folder / "cat" / "bad.png").touch()
    return folder


@pytest.fixture(scope="module")
def attacked(network, folder):
    """Return the images of the folder without labels."""
    source = replace(open_folder(folder), classes=(), labels=np.full(7, -1, np.int32))
    victims = attacks.read_attacked_images(network, source, LOADING)
    chosen = attacks.choose_attacks(["fgsm", "pgd"], num_steps=3)
    actual = attacks.attack(network, victims, chosen, [24 / 255, 4 / 255], LOADING)
    return victims, chosen, actual


def predicted(network: Pretrained, images: np.ndarray) -> np.ndarray:
    return np.asarray(seen(network.variables, images).argmax(-1))


def test_labels_are_those_of_the_folder_or_predictions(network, folder, attacked):
    victims = attacks.read_attacked_images(network, open_folder(folder), LOADING)
    assert victims.labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert any("not read: " in note and "bad.png" in note for note in victims.notes)
    np.testing.assert_array_equal(attacked[0].labels, predicted(network, victims.images))
    few = attacks.read_attacked_images(network, open_folder(folder), LOADING, count=3, seed=1)
    assert len(few.images) < 4
    assert set(few.names) < set(victims.names) | {"cat/bad.png"}


def test_the_first_reason_is_reported_when_no_image_can_be_read(network, tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    with pytest.raises(RequestError, match=r"no image can be read; .*a: the file is empty$"):
        attacks.read_attacked_images(network, open_folder(tmp_path), LOADING)


def test_the_more_probable_of_two_classes_with_the_same_name_is_the_label(network, folder):
    card = replace(network.card, classes=("bee", "bee", "cat"))
    victims = attacks.read_attacked_images(
        network._replace(card=card), open_folder(folder), LOADING
    )
    logits = np.asarray(seen(network.variables, victims.images))
    assert victims.labels.tolist() == [*logits[:3, :2].argmax(1), 2, 2, 2]
    assert "2 classes are called bee (0 and 1)" in victims.notes[0]


def test_table_and_summary_agree(attacked):
    _, _, actual = attacked
    result = attacks.summary(actual)
    assert result["clean"] == 1
    assert result["examples"] == 6
    assert list(result["robust"]) == ["fgsm", "pgd"]
    assert list(result["robust"]["pgd"]) == ["4", "24"]
    head, columns, *rows = attacks.table(actual).splitlines()
    assert "6 images" in head
    assert columns.split()[-3:] == ["0", "4", "24"]
    assert [row.split("  ")[0] for row in rows] == ["fgsm", "", "pgd", "", "worst of all"]
    share = result["robust"]["pgd"]["24"]
    assert rows[2].endswith(f"{100 * share:.1f} +- {100 * np.sqrt(share * (1 - share) / 6):.1f}")


def test_saved_pictures_are_in_the_ball_and_fool_the_network(network, attacked, tmp_path):
    victims, chosen, actual = attacked
    paintings = attacks.paint(network, victims, chosen, actual, count=4)
    assert len(paintings) == 4
    saved = np.stack([painting.pictures[2].pixels for painting in paintings])
    before = np.stack([painting.pictures[0].pixels for painting in paintings])
    epsilons = np.array([painting.facts["epsilon"] for painting in paintings])
    away = np.abs(saved.astype(int) - before).max((1, 2, 3))
    assert (away <= epsilons + 1e-4).all()
    fools = predicted(network, saved) != predicted(network, before)
    assert fools.any()
    for painting, label, fooled in zip(paintings, predicted(network, saved), fools, strict=True):
        assert painting.facts["after"]["index"] == label
        assert (painting.facts["before"]["name"] != painting.facts["after"]["name"]) == fooled
        photograph, perturbation, adversarial = painting.pictures
        factor = int(perturbation.caption.rpartition(" ")[2])
        change = adversarial.pixels.astype(int) - photograph.pixels
        np.testing.assert_array_equal(perturbation.pixels.astype(int) - 127, factor * change)
    paths = write_attack_pictures(tmp_path, actual, paintings)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert len(paths) == 2 + 2 * 4
    np.testing.assert_array_equal(np.asarray(Image.open(paths[3])), saved[0])


@pytest.mark.slow
def test_a_target_class_is_reached(network, attacked):
    victims, _, _ = attacked
    chosen = attacks.choose_attacks(["pgd"], num_steps=3, target=1)
    actual = attacks.attack(network, victims, chosen, [24 / 255], LOADING)
    paintings = attacks.paint(network, victims, chosen, actual, count=6, target=1)
    targets = [painting.facts["target"] for painting in paintings]
    assert all(target["name"] == "bee" for target in targets)
    assert all(target["after"] > target["before"] for target in targets)
    for painting in paintings:  # the target's probability is told, but not twice
        assert painting.pictures[2].caption.count("bee, p ") == 1


@pytest.mark.slow
def test_autoattack_is_reported_with_the_other_attacks(network, attacked):
    victims, _, _ = attacked
    chosen = attacks.choose_attacks(["fgsm", "autoattack"], num_steps=5)
    actual = attacks.attack(network, victims, chosen, [4 / 255], LOADING)
    first, *until, last = actual.outcomes
    assert (first, last) == ("fgsm", "autoattack, 5 steps, 5000 queries")  # it is not AutoAttack
    assert until == [f"{last} until {part}" for part in ("apgd-ce", "apgd-t", "fab-t")]
    assert last in attacks.table(actual)
    assert last in attacks.summary(actual)["robust"]
    painting = attacks.paint(network, victims, chosen, actual, count=1)[0]
    assert painting.facts["attack"] == last
    assert f"{last}, epsilon" in painting.line
    shares = [actual.accuracy(name)[0].value for name in actual.outcomes]
    assert shares == sorted(shares, reverse=True)
    assert "few_classes" in actual.flags


def test_unsupported_options_are_refused():
    with pytest.raises(RequestError, match="no attack 'pdg': choose from fgsm"):
        attacks.choose_attacks(["pdg"])
    with pytest.raises(RequestError, match="square supports only the norm linf and l2"):
        attacks.choose_attacks(["square"], norm="l1")
    with pytest.raises(RequestError, match="apgd-ce supports only the norm linf and l2"):
        attacks.choose_attacks(["pgd", "apgd-ce"], norm="l1")
    with pytest.raises(RequestError, match="AutoAttack does not support norm 'l1'"):
        attacks.choose_attacks(["autoattack"], norm="l1")
    with pytest.raises(RequestError, match="fab-t supports no --target: choose from fgsm, bim"):
        attacks.choose_attacks(["fab-t"], target=1)
