"""Training of every task: labels with blanks, numbers, ordered classes."""

from dataclasses import replace

import numpy as np
import pytest
from engine import LOADING, config, everything, source, train
from sklearn.metrics import average_precision_score, mean_absolute_error

from tljax.data.examples import Source, Splits
from tljax.data.options import AugmentConfig
from tljax.features.evaluate import METRICS, evaluate
from tljax.features.extract import compute_features
from tljax.pretrained import Card, Pretrained, load_pretrained, save
from tljax.runtime.errors import RequestError
from tljax.runtime.task import Task
from tljax.train.options import AdversaryConfig
from tljax.train.setup import fitted_task

pytestmark = pytest.mark.usefixtures("compilation_cache")

TASKS = ("multilabel", "regression", "ordinal")


def quick_for(kind: str) -> list:
    """Return the tasks, all but one of them slow."""
    return [pytest.param(task, marks=[] if task == kind else pytest.mark.slow) for task in TASKS]


def with_task(data: Source, kind: str) -> Source:
    """Label images, whose brightness increases with their class, for another task."""
    labels = data.labels
    rng = np.random.default_rng(len(data))
    blank = (rng.random((len(data), 2)) < 0.2) & (np.arange(len(data)) > 2)[:, None]
    if kind == "multilabel":
        applies = np.stack([labels > 0, labels > 1], 1).astype(np.float32)
        labels, classes = np.where(blank, np.nan, applies).astype(np.float32), ("bright", "white")
    elif kind == "regression":
        numbers = np.stack([10.0 * labels + 100, 3.0 - labels], 1)
        labels, classes = np.where(blank, np.nan, numbers).astype(np.float32), ("light", "dark")
    else:
        classes = ("low", "middle", "high")
    return replace(data, labels=labels, classes=classes, task=Task(kind))  # pyright: ignore[reportArgumentType]


def splits(kind: str) -> Splits:
    return Splits(with_task(source(23, broken=(4,)), kind), with_task(source(11, 1), kind), ())


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_learns_and_its_file_predicts_the_same(kind: str, tmp_path):
    data = splits(kind)
    result = train(config("finetune", epochs=12), data)
    first, *_, last = result.history
    assert last["val_loss"] < 0.7 * first["val_loss"]
    assert result.task.kind == result.evaluation.task.kind == kind
    main = result.evaluation.main_metric
    assert {f"val_{main}", "val_loss", "train_loss"} <= last.keys()

    card = Card(data.val.classes, "tiny", "mit", "0", "tljax", task=result.task)
    save(tmp_path / "x.safetensors", Pretrained(result.model, result.variables, card))
    loaded = load_pretrained(
        tmp_path / "x.safetensors", modules={"Unit": type(result.model.stages[0].module)}
    )
    assert loaded.card.task == result.task
    outputs = compute_features(*loaded[:2], data.val, LOADING, stop=None)
    again = evaluate(outputs, loaded.card.task)
    for name in METRICS[kind]:  # pyright: ignore[reportArgumentType]
        assert again.metric(name) == pytest.approx(result.evaluation.metric(name), nan_ok=True)


@pytest.mark.slow
def test_numbers_are_predicted_in_their_units():
    result = train(config("finetune", epochs=12), splits("regression"))
    labels = result.evaluation.labels
    known = ~np.isnan(labels[:, 0])
    error = mean_absolute_error(labels[known, 0], result.evaluation.decoded[known, 0])
    assert error < 5
    assert result.evaluation.per_name()["mae"][0] == pytest.approx(error)
    task = fitted_task(splits("regression").train)
    assert result.task == task
    assert task.mean[0] == pytest.approx(np.nanmean(splits("regression").train.labels[:, 0]))


def test_thresholds_are_chosen_on_the_validation_images():
    result = train(config("finetune", epochs=4), splits("multilabel"))
    assert len(result.task.thresholds) == 2
    evaluation = result.evaluation
    per_name = evaluation.per_name()
    for i in range(2):
        known = ~np.isnan(evaluation.labels[:, i])
        labels, scores = evaluation.labels[known, i], evaluation.decoded[known, i]
        assert per_name["average_precision"][i] == pytest.approx(
            average_precision_score(labels, scores)
        )
        f1 = per_name["f1"][i]
        assert f1 >= max(
            2 * (labels * (scores >= t)).sum() / (labels.sum() + (scores >= t).sum())
            for t in scores
        )


@pytest.mark.parametrize("kind", quick_for("ordinal"))
def test_fine_tuning_starts_at_the_probe(kind: str):
    result = train(config("lp-ft", epochs=1, freeze_to="stem"), splits(kind))
    assert result.probe_evaluation is not None
    assert result.history[0]["val_loss"] == pytest.approx(result.probe_evaluation.loss)
    chance = train(config("finetune", epochs=1), splits(kind)).history[0]["val_loss"]
    assert result.history[0]["val_loss"] < chance


@pytest.mark.slow
@pytest.mark.parametrize("kind", quick_for("regression"))
def test_a_resumed_run_is_the_same_bytes(kind: str, tmp_path):
    def stop(history):
        if len(history) == 3:
            raise KeyboardInterrupt

    settings = config(epochs=3, balance=kind != "regression", ema_decay=0.9)
    data = splits(kind)
    with pytest.raises(KeyboardInterrupt):
        train(settings, data, folder=tmp_path, on_epoch=stop)
    resumed = train(settings, data, folder=tmp_path)
    assert everything(resumed) == everything(train(settings, data))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("multilabel", {"choose_by": "kappa"}, "choose from loss, map, auroc, macro_f1"),
        ("regression", {"choose_by": "top1"}, "--choose-by top1 does not fit the task regression"),
        ("regression", {"balance": True}, "numbers have no classes to balance"),
        ("ordinal", {"adversary": AdversaryConfig("pgd")}, "--attack pgd trains on classes"),
        (
            "ordinal",
            {"augment": True, "augmentation": AugmentConfig(mixup=0.2)},
            "--mixup and --cutmix do not fit the task ordinal",
        ),
    ],
)
def test_options_that_do_not_fit_the_task_are_refused(kind: str, options, message: str):
    with pytest.raises(RequestError, match=message):
        train(config(**options), splits(kind))


def test_a_constant_number_is_refused():
    data = splits("regression")
    labels = data.train.labels.copy()
    labels[:, 1] = 7
    with pytest.raises(RequestError, match="dark is the same number for all training images"):
        train(config(), data._replace(train=replace(data.train, labels=labels)))


@pytest.mark.parametrize("choose_by", ["loss", "balanced_accuracy", "kappa"])
def test_the_best_epoch_has_the_best_value_of_the_metric(choose_by: str):
    result = train(config(epochs=5, choose_by=choose_by), splits("ordinal"))
    values = [entry[f"val_{choose_by}"] for entry in result.history]
    measured = result.evaluation.metric(choose_by)
    assert measured == pytest.approx((min if choose_by == "loss" else max)(values))


def test_mixed_labels_stay_unknown_where_one_is():
    settings = config(epochs=2, augment=True, augmentation=AugmentConfig(mixup=0.4, cutmix=1.0))
    history = train(settings, splits("multilabel")).history
    assert all(np.isfinite(entry["val_loss"]) for entry in history)
