"""The report and the model card state what was done and measured, and nothing else."""

import html
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from engine import LOADING, config, source, train
from made_up import KINDS, results_of, source_of

from tljax.data.examples import Source, Splits
from tljax.data.options import AugmentConfig
from tljax.pretrained import Card
from tljax.report.runs import remarks, write_evaluation_report, write_training_report
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task
from tljax.train.fit import FitResult
from tljax.train.options import AdversaryConfig, FitConfig

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CARD = Card(("a", "b", "c"), "tiny.web", "MIT", "ab" * 32, "tljax")
APART = Splits(source(11, broken=(4,)), source(7, 1, (2,)), ())
ALONE = Splits(APART.train, APART.train, ("no validation images: metrics are computed on ...",))
PLAIN = AugmentConfig(crop="center")


class Written(NamedTuple):
    """The files of a report, as a reader sees them."""

    result: FitResult
    card: str
    page: str
    front: dict
    settings: dict[str, str]
    skipped: str
    printed: dict[str, str]


def write(folder: Path, fit: FitConfig, splits: Splits = APART) -> Written:
    result = train(fit, splits, loading=LOADING)
    options = {"data": "noise", "seed": 0, "batch_size": 4, "fit": asdict(fit)}
    card = replace(CARD, task=result.task)
    printed = write_training_report(folder, result, splits, options, card, 1.0)
    text = (folder / "README.md").read_text()
    front, card = text.removeprefix("---\n").split("\n---\n", 1)
    card = card.replace("\\", "")
    table = card.partition("## Training")[2].partition("##")[0]
    cells = dict(re.findall(r"^\| (\S+) \| (.+) \|$", table, re.MULTILINE))
    page = re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text().partition("<body>")[2])
    skipped = (folder / "skipped.csv").read_text()
    page = html.unescape(page)
    return Written(result, card, page, yaml.safe_load(front), cells, skipped, printed)


@pytest.mark.slow
def test_a_probe_is_not_called_fine_tuned_and_has_no_training_settings(tmp_path):
    fit = FitConfig("probe", augmentation=PLAIN, epochs=3)
    written = write(tmp_path, fit)
    assert written.settings.keys() == {
        "setting",
        "---",
        "recipe",
        "balance",
        "cache",
        "cache_dtype",
    }
    assert "a linear head on the frozen features of the pretrained network tiny.web" in written.card
    assert "fine-tuned on" not in written.card
    assert "The epoch was selected" not in written.card
    for text in (written.card, written.page):
        assert "fine-tuned" not in text
        assert not re.search("mixup|epsilon|momentum|learning_rate|epochs", text)


def test_a_fine_tuned_network_has_the_settings_that_took_effect(tmp_path):
    written = write(tmp_path, config("finetune", freeze_to="stem", rate=0.02, epochs=8))
    assert not remarks(written.result)
    assert "the pretrained network tiny.web, fine-tuned on noise" in written.card
    assert written.settings["optimizer/learning_rate"] == "0.02"
    assert written.settings["freeze_to"] == "stem"
    assert "fine-tuned accuracy" in written.page
    assert "attacked" not in written.card + written.page
    idle = {"augmentation/mixup", "adversary/epsilon", "optimizer/momentum", "cache_views"}
    assert not idle & written.settings.keys()
    assert not re.search("mixup|epsilon|momentum", written.page)
    # Settings that were not set are left out.
    assert not {"train", "rates", "head_after"} & written.settings.keys()


@pytest.mark.slow
def test_mixup_is_listed_if_images_were_mixed(tmp_path):
    mixed = replace(PLAIN, mixup=0.4)
    fit = config("finetune", augment=True, augmentation=mixed, optimizer="sgd", epochs=1)
    written = write(tmp_path, fit)
    assert written.settings["augmentation/mixup"] == "0.4"
    assert written.settings["optimizer/momentum"] == "0.9"
    assert not {"augmentation/scale", "frozen_dtype", "cache"} & written.settings.keys()


@pytest.mark.slow
def test_a_network_from_scratch_names_no_pretrained_network(tmp_path):
    written = write(tmp_path, config("scratch", augmentation=PLAIN, epochs=1))
    assert "trained on noise from random weights" in written.card
    assert written.front["tags"] == ["jax", "tiny"]
    assert "trained accuracy" in written.page
    for text in (written.card, written.page):
        assert "fine-tuned" not in text
    assert "License" not in written.card
    assert "pretrained network" not in written.card


def test_without_validation_images_every_number_is_of_the_training_images(tmp_path):
    written = write(tmp_path, config("lp-ft", epochs=1, augmentation=PLAIN), ALONE)
    assert "10 training images and no validation images" in written.card
    assert "On the 10 training images:" in written.card
    assert not re.search(r"(?<!no )validation (images|set)", written.card)
    assert "model-index" not in written.front
    assert "metrics" not in written.front
    assert re.search(r"validation images\s+none", written.page)
    assert "Seen in training" not in written.page
    assert written.skipped.count("image 4") == 1


@pytest.mark.slow
def test_the_accuracy_under_attack_is_measured_and_shown(tmp_path):
    fast = AdversaryConfig("fast", 16.0)
    written = write(tmp_path, config("finetune", epochs=1, augmentation=PLAIN, adversary=fast))
    assert written.result.robust is not None
    robust = f"{written.result.robust.top1:.1%}"
    assert f"| top-1 accuracy under PGD, 20 steps, epsilon 16/255 | {robust} |" in written.card
    assert "or under another attack were not measured" in written.card
    assert written.settings["adversary/epsilon"] == "16.0"
    assert "adversary/attack_steps" not in written.settings  # fast takes one


@pytest.mark.slow
def test_a_run_in_which_no_epoch_was_better_says_so(tmp_path):
    # With a learning rate of 0, no epoch is better than the head of zeros.
    written = write(tmp_path, config("finetune", rate=0.0, epochs=1, augmentation=PLAIN))
    (remark,) = remarks(written.result)
    assert "no epoch was better" in remark.lower()
    assert remark in written.card
    assert remark in written.page


def test_unreadable_images_are_not_counted_as_training_images(tmp_path):
    written = write(tmp_path, FitConfig("probe"))
    assert "10 training and 6 validation images" in written.card
    assert re.search(r"training images\s+10\s", written.page)
    assert re.search(r"validation images\s+6\s", written.page)
    assert "image 4" in written.skipped
    assert "image 2" in written.skipped


@pytest.mark.slow
def test_a_first_epoch_below_the_probe_is_explained(tmp_path):
    written = write(tmp_path, config("lp-ft", freeze_to="stem", rate=0.5, epochs=1))
    before, after = (entry["val_top1"] for entry in written.result.history)
    assert before > after, "this learning rate is meant to be much too large"
    *_, remark = remarks(written.result)
    assert f"fell from {before:.1%} (probe) to {after:.1%}" in remark
    assert "--layer-decay" in remark
    assert remark in written.page
    assert remark in written.card


# Tasks


def splits_of(kind: Kind) -> Splits:
    """Return images of noise, brighter with their class; the others follow from the class."""

    def part(count: int, seed: int) -> Source:
        images = source(count, seed)
        classes = images.labels
        labels = {
            "classification": classes,
            "ordinal": classes,
            "multilabel": np.stack([classes > 0, classes > 1, classes < 2], 1).astype(np.float32),
            "regression": (20 + 10 * classes[:, None] + np.arange(3)).astype(np.float32),
        }[kind]
        if labels.ndim == 2:
            labels[2, 1] = np.nan
        groups = np.arange(count, dtype=np.int32) // 2
        units = {"units": ("years", "years", "years")} if kind == "regression" else {}
        return replace(images, labels=labels, groups=groups, task=Task(kind, **units))

    return Splits(part(12, 0), part(9, 1), ())


@pytest.mark.parametrize(
    ("kind", "metric", "selected", "heading"),
    [
        pytest.param(
            *("classification", "accuracy", "top-1 accuracy", "Confusion matrix"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("ordinal", "quadratic kappa", "quadratic kappa", "Confusion matrix"),
            marks=pytest.mark.slow,
        ),
        ("multilabel", "mAP", "mAP", "Labels"),
        ("regression", "R2", "loss", "Numbers"),
    ],
)
def test_a_run_of_every_task_is_reported(
    tmp_path: Path, kind: Kind, metric: str, selected: str, heading: str
):
    written = write(tmp_path, config("lp-ft", epochs=1, augmentation=PLAIN), splits_of(kind))
    evaluation = written.result.evaluation
    assert [*written.printed] == [f"probe {metric}", f"fine-tuned {metric}"]
    value = evaluation.format(evaluation.main_metric)
    text = written.printed[f"fine-tuned {metric}"]
    assert text.startswith(value.removesuffix(" years"))
    assert re.search(r"\(.+ to .+\)", text)
    assert re.search(rf"fine-tuned {metric}\s+{re.escape(value)}", written.page)
    assert re.search(r"by resampling 5 groups", written.page)
    assert re.search(rf"^\s*{heading}\s*$", written.page, re.MULTILINE)
    assert f"The epoch was selected by its {selected} on the validation images" in written.card
    assert f"| {text} |" in written.card
    assert "of only 5 groups" in written.card
    blanks = "1 of 27 " in written.card.partition("## Limits")[2]
    assert blanks == (kind in ("multilabel", "regression"))
    assert ("thresholds were chosen" in written.card) == (kind == "multilabel")


def test_an_evaluation_of_every_task_is_reported(tmp_path: Path):
    for kind in KINDS:
        results = results_of(kind, ("a", "b", "c"), groups=20)
        images = source_of(results.evaluation, results.names)
        path = tmp_path / f"{kind}.html"
        write_evaluation_report(path, kind, results, images, ["a note"], [("x.jpg", "broken")])
        page = re.sub(r"<[^>]+>", " ", path.read_text().partition("<body>")[2])
        for score in results.scores:
            assert re.search(rf"{score.title}\s+{score.value}\s+{score.interval}\s", page)
        assert re.search(r"images\s+60\s", page)
        assert "by resampling 20 groups" in page
        assert "a note" in page
        assert "x.jpg" in page
