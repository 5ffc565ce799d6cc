"""What the page and the card of a run say: what was done and measured, and nothing else."""

import html
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from engine import LOADING, config, source, train

from tljax.data.options import AugmentConfig
from tljax.data.sources import Splits
from tljax.pretrained import Card
from tljax.report.runs import remarks, write_training_report
from tljax.train.fit import FitResult
from tljax.train.options import AdversaryConfig, FitConfig

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CARD = Card(("a", "b", "c"), "tiny.web", "MIT", "ab" * 32, "tljax")
APART = Splits(source(11, broken=(4,)), source(7, 1, (2,)), ())
ALONE = Splits(APART.train, APART.train, ("no validation images: all figures are of ...",))
PLAIN = AugmentConfig(crop=False)


class Written(NamedTuple):
    """A report as its readers see it."""

    result: FitResult
    card: str
    page: str
    front: dict
    settings: dict[str, str]
    skipped: str


def write(folder: Path, what: FitConfig, splits: Splits = APART) -> Written:
    result = train(what, splits, loading=LOADING)
    asked = {"data": "noise", "seed": 0, "batch_size": 4, "fit": asdict(what)}
    write_training_report(folder, result, splits, asked, CARD, 1.0)
    text = (folder / "README.md").read_text()
    front, card = text.removeprefix("---\n").split("\n---\n", 1)
    card = card.replace("\\", "")
    table = card.partition("## Training")[2].partition("##")[0]
    cells = dict(re.findall(r"^\| (\S+) \| (.+) \|$", table, re.MULTILINE))
    page = re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text().partition("<body>")[2])
    skipped = (folder / "skipped.csv").read_text()
    return Written(result, card, html.unescape(page), yaml.safe_load(front), cells, skipped)


def test_a_probe_is_not_called_fine_tuned_and_has_no_settings_of_training(tmp_path):
    what = FitConfig("probe", augmentation=PLAIN, epochs=3)
    found = write(tmp_path, what)
    assert found.settings.keys() == {"setting", "---", "recipe", "cache", "cache_dtype"}
    assert "a linear head on the frozen features of the pretrained network tiny.web" in found.card
    assert "transferred" not in found.card
    assert "decided which epoch" not in found.card
    for text in (found.card, found.page):
        assert "fine-tuned" not in text
        assert not re.search("mixup|epsilon|momentum|learning_rate|epochs", text)


def test_a_fine_tuned_network_has_the_settings_that_took_effect(tmp_path):
    found = write(tmp_path, config("finetune", freeze_to="stem", rate=0.02, epochs=8))
    assert not remarks(found.result)
    assert "the pretrained network tiny.web, transferred to noise" in found.card
    assert found.settings["optimizer/learning_rate"] == "0.02"
    assert found.settings["freeze_to"] == "stem"
    assert "fine-tuned accuracy" in found.page
    assert "attacked" not in found.card + found.page
    idle = {"augmentation/mixup", "adversary/epsilon", "optimizer/momentum", "cache_views"}
    assert not idle & found.settings.keys()
    assert not re.search("mixup|epsilon|momentum", found.page)
    # What was not asked for is no setting.
    assert not {"train", "rates", "head_after"} & found.settings.keys()


def test_mixup_is_said_where_images_were_mixed(tmp_path):
    mixed = replace(PLAIN, mixup=0.4)
    what = config("finetune", augment=True, augmentation=mixed, optimizer="sgd", epochs=1)
    found = write(tmp_path, what)
    assert found.settings["augmentation/mixup"] == "0.4"
    assert found.settings["optimizer/momentum"] == "0.9"
    assert not {"augmentation/scale", "frozen_dtype", "cache"} & found.settings.keys()


def test_a_network_from_scratch_is_nobody_s(tmp_path):
    found = write(tmp_path, config("scratch", augmentation=PLAIN, epochs=1))
    assert "trained on noise from random weights" in found.card
    assert found.front["tags"] == ["jax", "tiny"]
    assert "trained accuracy" in found.page
    for text in (found.card, found.page):
        assert "fine-tuned" not in text
        assert "transferred" not in text
    assert "Licence" not in found.card
    assert "pretrained network" not in found.card


def test_without_validation_images_every_figure_is_of_the_training_images(tmp_path):
    found = write(tmp_path, config("lp-ft", epochs=1, augmentation=PLAIN), ALONE)
    assert "10 training images and none for validation" in found.card
    assert "On the 10 training images:" in found.card
    assert not re.search(r"validation images|validation set", found.card)
    assert "model-index" not in found.front
    assert "metrics" not in found.front
    assert re.search(r"validation images\s+none", found.page)
    assert "Seen in training" not in found.page
    assert found.skipped.count("image 4") == 1


def test_what_an_attack_left_is_measured_and_said(tmp_path):
    fast = AdversaryConfig("fast", 16.0)
    found = write(tmp_path, config("finetune", epochs=1, augmentation=PLAIN, adversary=fast))
    assert found.result.robust is not None
    robust = f"{found.result.robust.top1:.1%}"
    assert f"| top-1 accuracy under PGD, 20 steps, epsilon 16/255 | {robust} |" in found.card
    assert "changed on purpose by another attack" in found.card
    assert found.settings["adversary/epsilon"] == "16.0"
    assert "adversary/attack_steps" not in found.settings  # fast takes one


def test_a_run_whose_training_was_in_vain_says_so(tmp_path):
    """With a learning rate of 0 no epoch is better than the head of zeros, which is kept."""
    found = write(tmp_path, config("finetune", rate=0.0, epochs=1, augmentation=PLAIN))
    (remark,) = remarks(found.result)
    assert "no epoch was better" in remark.lower()
    assert remark in found.card
    assert remark in found.page


def test_images_that_could_not_be_read_are_not_counted_as_trained_on(tmp_path):
    found = write(tmp_path, FitConfig("probe"))
    assert "10 training and 6 validation images" in found.card
    assert re.search(r"training images\s+10\s", found.page)
    assert re.search(r"validation images\s+6\s", found.page)
    assert "image 4" in found.skipped
    assert "image 2" in found.skipped
