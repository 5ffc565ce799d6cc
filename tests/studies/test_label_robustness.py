"""Robustness of a small network with several labels: figures, targets, captions and pictures."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from scipy.special import expit

from tljax.data.examples import Source
from tljax.data.folders import open_folder
from tljax.data.options import Loading
from tljax.models import apply
from tljax.pretrained import Card, Pretrained
from tljax.report.gallery import write_attack_pictures
from tljax.runtime.errors import RequestError
from tljax.runtime.task import Task
from tljax.studies import label_robustness
from tljax.studies import robustness as attacks
from tljax.studies.attack_captions import LabelTarget, label_facts

pytestmark = pytest.mark.usefixtures("quick_to_compile")
LOADING = Loading(batch_size=4)
NAMES = ("ant", "bee", "cat")
TASK = Task("multilabel", thresholds=(0.4, 0.5, 0.6))
CARD = Card(NAMES, "somewhere", "MIT", "0" * 64, "torchvision", task=TASK)


@jax.jit
def logits_of(variables, images: np.ndarray) -> jax.Array:
    return apply(tiny.MODEL, variables, images).logits


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def network(pixels) -> Pretrained:
    variables = jax.tree.map(np.array, tiny.random_variables())
    # Every label is predicted for about half of the images, most of them with confidence.
    variables["params"]["head"]["kernel"] /= np.asarray(logits_of(variables, pixels)).std(0)
    middle = np.quantile(np.asarray(logits_of(variables, pixels)), 3.5 / 8, axis=0)  # no logit is 0
    variables["params"]["head"]["bias"] -= middle
    return Pretrained(tiny.MODEL, variables, CARD)


def probabilities(network: Pretrained, images: np.ndarray) -> np.ndarray:
    return expit(np.asarray(logits_of(network.variables, images)))


@pytest.fixture(scope="module")
def source(network, pixels) -> Source:
    """Return labels in another order than the network's, a fifth of them unknown, and one wrong."""
    labels = TASK.applies(probabilities(network, pixels)).astype(np.float32)[:, ::-1].copy()
    labels[0, 0] = 1 - labels[0, 0]
    labels[1, 1] = labels[2, 2] = np.nan
    labels[4] = np.nan
    return Source(
        pixels, labels, NAMES[::-1], [f"{i}.png" for i in range(9)], task=Task("multilabel")
    )


def read(network: Pretrained, source: Source, target=None, **options) -> attacks.AttackedImages:
    return attacks.read_attacked_images(network, source, LOADING, target=target, **options)


def run(network: Pretrained, victims: attacks.AttackedImages, target=None, names=("fgsm", "pgd")):
    chosen = attacks.choose_attacks(names, num_steps=5, target=target, several_labels=True)
    return chosen, label_robustness.attack_labels(
        network, victims, chosen, [48 / 255, 8 / 255], LOADING
    )


@pytest.fixture(scope="module")
def attacked(network, source):
    victims = read(network, source)
    return victims, *run(network, victims)


def test_labels_are_matched_by_name_and_images_without_a_known_one_are_left_out(network, source):
    victims = read(network, source)
    assert victims.names == [f"{i}.png" for i in range(9) if i != 4]
    assert victims.notes == ["left out 1 images without a known label"]
    np.testing.assert_array_equal(victims.labels, np.delete(source.labels[:, ::-1], 4, 0))
    assert len(read(network, source, count=3, seed=1).images) == 3
    with pytest.raises(RequestError, match="no label of any image is known"):
        read(network, replace(source, labels=source.labels * np.nan))


@pytest.mark.parametrize("classes", [(), ("bee", "dog")])
def test_predictions_are_the_labels_of_images_without_labels_or_with_classes(
    network, pixels, tmp_path: Path, classes
):
    for i, image in enumerate(pixels[:4]):
        path = tmp_path / (classes[i % 2] if classes else "") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    source = open_folder(tmp_path)
    if not classes:
        source = replace(source, classes=(), labels=np.full(4, -1, np.int32))
    victims = read(network, source)
    expected = TASK.applies(probabilities(network, victims.images))
    np.testing.assert_array_equal(victims.labels, expected)
    assert victims.labels.dtype == np.float32
    assert len(victims.notes) == bool(classes)


def test_table_and_summary_agree_with_the_metrics(attacked, network):
    victims, _, actual = attacked
    result = label_robustness.summary(actual, CARD)
    known = ~np.isnan(victims.labels)
    right = TASK.applies(probabilities(network, victims.images)) == (victims.labels == 1)
    assert result["examples"] == 8
    assert result["clean"]["decisions"] == pytest.approx(right[known].mean())
    assert right[known].sum() == known.sum() - 1  # the label that was turned round
    assert result["clean"]["images"] == 7 / 8
    assert list(result["robust"]) == list(result["robust_rounded"]) == ["fgsm", "pgd"]
    assert list(result["robust"]["pgd"]) == ["8", "48"]
    worst = result["robust"]["pgd"]["48"]
    assert all(worst[name] < result["clean"][name] for name in ("decisions", "images", "map"))
    head, columns, *rows = label_robustness.table(actual, CARD).splitlines()
    assert head == f"in % of 8 images with {known.sum()} known labels, +- standard error"
    assert columns.split()[-3:] == ["0", "8", "48"]
    titles = ["labels right", "images all right", "mAP"]
    assert [row.split("  ")[0] for row in rows[::2]] == [
        f"{title}, {name}" for title in titles for name in ("fgsm", "pgd")
    ]
    assert rows[2].endswith(f"{100 * worst['decisions']:.1f}")
    share = worst["images"]
    assert rows[6].endswith(f"{100 * share:.1f} +- {100 * np.sqrt(share * (1 - share) / 8):.1f}")
    assert rows[10].endswith(f"{100 * worst['map']:.1f}")


@pytest.mark.parametrize("applies", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_target_is_measured_on_the_images_that_do_not_have_it(network, source, applies):
    target = LabelTarget(2, applies)
    victims = read(network, source, target)
    labels, before = source.labels[:, 0], TASK.applies(probabilities(network, source.examples))
    rows = np.flatnonzero((labels == (not applies)) & (before[:, 2] != applies))
    assert victims.names == [f"{i}.png" for i in rows]
    assert 0 < len(rows) < 8
    assert f"attacked are the {len(rows)} images that 'cat'" in victims.notes[-1]
    chosen, actual = run(network, victims, target)
    adversarial = chosen["pgd"](
        attacks.logits_fn(network), victims.images / np.float32(255), victims.labels,
        jax.random.key(0), epsilon=np.float32(48 / 255),
    )  # fmt: skip
    reached = TASK.applies(probabilities(network, adversarial))[:, 2] == applies
    result = label_robustness.summary(actual, CARD, target)
    assert result["target"] == {"name": "cat", "applies": applies}
    assert result["success"]["pgd"]["48"] == pytest.approx(reached.mean())
    assert reached.mean() > 0.6
    assert result["success"]["pgd"]["8"] <= result["success"]["pgd"]["48"]
    goal = "predicted" if applies else "no longer predicted"
    head, columns, *lines = label_robustness.table(actual, CARD, target).splitlines()
    assert head == f"'cat' {goal}, in % of {len(rows)} images, +- standard error"
    assert columns.split()[-2:] == ["8", "48"]
    assert f"  {100 * reached.mean():.1f} +- " in lines[2]

    by_image = label_robustness.by_image(actual, target)
    assert by_image.clean.all()
    for painting in attacks.paint(network, victims, chosen, by_image, count=2, target=target):
        told = painting.facts["target"]
        assert (told["after"] > told["before"]) == applies
        assert painting.pictures[0].caption.count("\ncat, p ") == 1
        assert painting.pictures[2].caption.count("\ncat, p ") == 1


def test_no_image_for_a_target_is_one_line(network, source):
    with pytest.raises(
        RequestError, match=r"no image to attack that 'ant' applies to and is predicted for$"
    ):
        read(network, replace(source, labels=source.labels * 0), LabelTarget(0, applies=False))


def test_captions_name_the_labels_that_changed(network, attacked, tmp_path: Path):
    victims, chosen, actual = attacked
    by_image = label_robustness.by_image(actual)
    paintings = attacks.paint(network, victims, chosen, by_image, count=4)
    saved = np.stack([painting.pictures[2].pixels for painting in paintings])
    photographs = np.stack([painting.pictures[0].pixels for painting in paintings])
    after, before = (TASK.applies(probabilities(network, x)) for x in (saved, photographs))
    assert (after != before).any()
    for painting, old, new in zip(paintings, before, after, strict=True):
        names = {name for name, yes in zip(NAMES, old, strict=True) if yes}
        assert {label["name"] for label in painting.facts["before"]["labels"]} == names
        caption = painting.pictures[0].caption.split("\n")[1]
        assert set(caption.split(", ")) == (names or {"no label"})
        added = [name for name, a, b in zip(NAMES, old, new, strict=True) if b and not a]
        removed = [name for name, a, b in zip(NAMES, old, new, strict=True) if a and not b]
        assert painting.facts["after"]["added"] == added
        assert painting.facts["after"]["removed"] == removed
        lines = [f"added {', '.join(added)}"] * bool(added)
        lines += [f"removed {', '.join(removed)}"] * bool(removed)
        assert painting.pictures[2].caption.split("\n")[1:] == (lines or ["no label changed"])
    paths = write_attack_pictures(tmp_path, by_image, paintings)
    assert len(paths) == 2 + 2 * 4


def test_captions_follow_the_thresholds():
    rows = {"before": [0.45, 0.45, 0.45], "exact": [0.3, 0.7, 0.7], "after": [0.45, 0.45, 0.45]}
    rows = {when: np.array(row, np.float32) for when, row in rows.items()}
    facts, captions = label_facts(CARD, rows, None)
    assert captions == {
        "before": "ant", "exact": "added bee, cat\nremoved ant", "after": "no label changed",
    }  # fmt: skip
    assert [label["name"] for label in facts["exact"]["labels"]] == ["bee", "cat"]


def test_a_target_is_a_label_or_not_a_label():
    assert attacks.find_target(CARD, "Bee") == LabelTarget(1, applies=True)
    assert attacks.find_target(CARD, "not:bee") == LabelTarget(1, applies=False)
    assert attacks.find_target(CARD, "2") == LabelTarget(2, applies=True)
    odd = replace(CARD, classes=("not:bee", "bee"))
    assert attacks.find_target(odd, "not:bee") == LabelTarget(0, applies=True)
    assert attacks.find_target(replace(CARD, task=Task()), "bee") == 1
    with pytest.raises(RequestError, match=r"no label is called 'be'.*did you mean bee"):
        attacks.find_target(CARD, "not:be")


@pytest.mark.parametrize("name", sorted(attacks.ATTACKS.keys() - attacks.LABEL_ATTACKS))
def test_attacks_on_exclusive_classes_are_refused(name):
    message = f"{name} is defined for exclusive classes: .* choose from fgsm, bim, mi-fgsm, pgd, ap"
    with pytest.raises(RequestError, match=message):
        attacks.choose_attacks(["pgd", name], several_labels=True)


@pytest.mark.parametrize(
    ("kind", "what"), [("regression", "numbers"), ("ordinal", "ordered classes")]
)
def test_numbers_and_ordered_classes_are_refused(kind, what):
    with pytest.raises(RequestError, match=f"^somewhere predicts {what}: attacks are defined"):
        attacks.require_attackable(replace(CARD, task=Task(kind)))
    attacks.require_attackable(CARD)
