"""The model card, parsed as the Hub and a Markdown reader do it, with ordinary and odd names."""

import ast
import io
import shlex
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from made_up import of_confusion, results_of
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from tljax.models import Model, Stage, abstract_variables
from tljax.models.layers import GlobalAveragePool, LinearHead
from tljax.pretrained import Card, Pretrained, save
from tljax.report.card import RunFacts, model_card
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.settings import Kind

RUN = RunFacts(
    title="ants and bees",
    model="resnet18",
    weights=Card(("ants", "bees"), "resnet18.ktb_in1k", "Apache-2.0", "ab" * 32, "tljax"),
    preprocess=Preprocess(),
    data="data/hymenoptera",
    train_examples=245,
    recipe={"recipe": "lp-ft", "epochs": "10"},
    results=of_confusion(np.array([[60, 10], [5, 78]]), ("ants", "bees")),
    environment={"jax": "0.10.2"},
    workdir="runs/ants",
)


def parse(card: str) -> list[Token]:
    body = card.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark").enable("table").parse(body)


def visible_texts(tokens: list[Token]) -> list[str]:
    """Return the text of every heading, paragraph, item and cell, as a reader sees it."""
    texts = []
    for token in tokens:
        if token.type == "inline":
            kinds = {child.type for child in token.children or ()}
            assert kinds <= {"text", "text_special", "softbreak"}, kinds  # no markup inside
            texts.append("".join(child.content or " " for child in token.children or ()))
    return texts


def code(card: str) -> list[str]:
    return [token.content for token in parse(card) if token.type == "fence"]


def test_the_hub_reads_the_front_matter():
    data = ModelCard(model_card(replace(RUN, base_model="timm/resnet18.tv_in1k"))).data
    assert data.license == "apache-2.0"
    assert data.base_model == "timm/resnet18.tv_in1k"
    assert data.library_name == "tljax"
    assert data.pipeline_tag == "image-classification"
    assert data.tags == ["jax", "transfer-learning", "resnet18"]
    assert data.metrics == ["accuracy", "balanced_accuracy", "f1", "roc_auc"]
    assert data.model_name == "ants and bees"
    result, *others = data.eval_results or ()
    assert [other.metric_name for other in others][:2] == ["balanced accuracy", "macro F1"]
    assert (result.task_type, result.dataset_name) == ("image-classification", "data/hymenoptera")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.902)
    assert result.dataset_type == "imagefolder"


@pytest.mark.parametrize(
    ("data", "type_"),
    [
        *((name, name) for name in ("digits", "tfds:oxford_iiit_pet")),
        *(("hf:food101", "food101"), ("photos/labels.csv", "csv"), ("labels.jsonl", "json")),
    ],
)
def test_a_data_set_with_a_name_or_a_table_is_not_an_image_folder(data: str, type_: str):
    result, *_ = ModelCard(model_card(replace(RUN, data=data))).data.eval_results or ()
    assert (result.dataset_type, result.dataset_name) == (type_, data)


@pytest.mark.parametrize(
    ("source", "license_", "name"),
    [("MIT", "mit", None), ("unknown", "unknown", None), ("LicenseRef-X: y", "other", True)],
)
def test_licenses_that_the_hub_does_not_list_are_named(source: str, license_: str, name: object):
    card = model_card(replace(RUN, weights=replace(RUN.weights, licence=source)))
    data = ModelCard(card).data
    assert data.license == license_
    assert getattr(data, "license_name", None) == (source if name else None)
    assert ("is unknown" in card) == (source == "unknown")


def test_the_numbers_are_those_of_the_run():
    texts = visible_texts(parse(model_card(RUN)))
    assert texts[0] == "ants and bees"
    assert "245 training and 153 validation images." in " ".join(texts)
    position = texts.index("top-1 accuracy")
    assert texts[position + 1] == "90.2%"
    position = texts.index("most often taken for")
    assert texts[position + 1 : position + 9] == [
        *("ants", "60 of 70", "85.7%", "bees"),
        *("bees", "78 of 83", "94.0%", "ants"),
    ]
    assert texts[-2:] == ["jax", "0.10.2"]


def test_what_was_not_measured_is_left_out():
    headings = ["Data", "Training", "Results", "Limits", "Use", "License of the weights"]
    texts = visible_texts(parse(model_card(RUN)))
    assert [text for text in texts if text in {*headings, "Calibration"}] == headings
    assert "were not searched for" in " ".join(texts)


def test_calibration_has_its_table():
    results = results_of("classification", ("ants", "bees"))
    expected = results.calibration
    assert expected is not None
    texts = visible_texts(parse(model_card(replace(RUN, results=results))))
    position = texts.index("uncalibrated")
    assert texts[position + 1 : position + 3] == [
        f"{expected.before.error:.1%}",
        f"{expected.loss_before:.3f}",
    ]
    assert texts[position + 4 : position + 6] == [
        f"{expected.after.error:.1%}",
        f"{expected.loss_after:.3f}",
    ]


def test_limits_follow_from_the_facts():
    def limits(**facts: object) -> str:
        return " ".join(visible_texts(parse(model_card(replace(RUN, **facts)))))

    assert "fewer than 30" not in limits()
    few = of_confusion(np.array([[9, 0], [0, 50]]), ("ants", "bees"))
    assert "1 of 2 classes have fewer" in limits(results=few)
    assert "None of them was found among the training images" in limits(seen_in_training=0)
    assert "3 of them are training images or resemble one" in limits(seen_in_training=3)
    assert "results are optimistic" not in limits()
    chosen = limits(chosen_by="macro F1")
    assert "selected by its macro F1 on the validation images, so the results are opt" in chosen


def test_without_validation_images_no_accuracy_is_published():
    card = model_card(
        replace(RUN, validated=False, seen_in_training=None, chosen_by="top-1 accuracy")
    )
    data = ModelCard(card).data
    assert not data.eval_results
    assert getattr(data, "metrics", None) is None
    assert "245 training images and no validation images." in card
    assert "On the 153 training images:" in card
    assert "The epoch was selected by its top-1 accuracy on the training images" in card
    assert card.count("validation images") == 1


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("tuned", "the pretrained network resnet18.ktb_in1k, fine-tuned on data/hymenoptera"),
        ("probe", "a linear head on the frozen features of the pretrained network resnet18"),
        ("scratch", "trained on data/hymenoptera from random weights"),
    ],
)
def test_it_states_the_origin_of_the_network(origin: str, words: str):
    card = model_card(replace(RUN, origin=origin))
    assert words in " ".join(visible_texts(parse(card)))
    assert ("fine-tuned" in card) == (origin == "tuned")
    assert ("transfer-learning" in card) == (origin != "scratch")
    assert ("License of the weights" in card) == (origin != "scratch")


def test_of_many_classes_only_the_lowest_accuracies_are_listed():
    confusion = np.diag(np.arange(100, 0, -1))
    confusion[:, 0] += 5
    names = tuple(f"n{i}" for i in range(100))
    weights = replace(RUN.weights, classes=names)
    texts = visible_texts(
        parse(model_card(replace(RUN, weights=weights, results=of_confusion(confusion, names))))
    )
    assert "The 10 classes with the lowest accuracy:" in texts
    assert texts[texts.index("top-5 accuracy") + 1].endswith("%")
    position = texts.index("most often taken for")
    assert texts[position + 1 : position + 41 : 4] == [f"n{i}" for i in range(99, 89, -1)]


anything = st.text(st.characters(exclude_characters="\0"), min_size=1)
NASTY = [
    "a | b",
    "---",
    "# x\n\n# y",
    "<script>alert(1)</script>",
    "[a](http://b)",
    "https://evil.example www.evil.example",
    "![x](y)",
    "`code` ``` ~~~",
    "*a* _b_ **c** ~~d~~",
    "&lt; &#35;",
    "caf\udce9",
    "日本 \U0001f41c \u200d",
    'a: b # "c" \\d',
    "$(rm -rf /) 'q' $x$",
    "\x85\u2028\ufeff\x07",
    "1. x",
    "===",
    "a\\",
]


@settings(max_examples=25, deadline=None)
@given(anything | st.sampled_from(NASTY))
def check_any_text(text: str):
    def card(word: str) -> str:
        return model_card(
            replace(
                RUN,
                title=word,
                model=word,
                base_model=word,
                data=word,
                weights=Card((word, "b"), word, word, word, "tljax"),
                results=replace(RUN.results, names=(word, "b")),
                chosen_by="accuracy",
                recipe={word: word},
                attacked=(0.5, word),
                environment={word: word},
                workdir=word,
            )
        )

    text_card, plain_card = card(text), card("plain")
    text_card.encode("utf-8")
    assume("license: other" in text_card)  # hypothesis reads our sources, and tries their licenses
    data, plain = (yaml.safe_load(c.split("\n---\n")[0]) for c in (text_card, plain_card))
    assert data.keys() == plain.keys()
    name = data["license_name"]
    assert name == data["base_model"] == data["tags"][-1] == data["model-index"][0]["name"]

    tokens, expected = parse(text_card), parse(plain_card)
    assert [token.type for token in tokens] == [token.type for token in expected]
    words = [text.replace("plain", name.strip()) for text in visible_texts(expected)]
    assert [" ".join(text.split()) for text in visible_texts(tokens)] == [
        " ".join(text.split()) for text in words
    ]
    assert name == " ".join(name.split())
    if text.isprintable():
        assert name == " ".join(text.split())


for nasty in NASTY:
    check_any_text = example(nasty)(check_any_text)


def test_any_text_is_shown_as_it_is():
    check_any_text()


def test_bare_addresses_do_not_become_links():
    card = model_card(replace(RUN, data="www.a.example https://b.example c@d.example"))
    assert "www." not in card.split("\n---\n")[1]
    assert "https:" not in card.split("\n---\n")[1]
    assert "c@" not in card.split("\n---\n")[1]


@pytest.mark.parametrize("workdir", ["runs/a", "a  b", "it's", '"', "``` ```", "a\n```\nb", "$x"])
def test_the_commands_name_the_folder(workdir: str):
    shell, python = code(model_card(replace(RUN, workdir=workdir)))
    assert shlex.split(shell)[:2] == ["tljax", "predict"]
    assert shlex.split(shell)[-2:] == ["--weights", workdir]
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    (load,) = (c for c in calls if getattr(c.func, "id", "") == "load_pretrained")
    assert ast.literal_eval(load.args[0]) == workdir


# Tasks

NAMES = ("cat", "dog", "x | <b>y</b>")


def run_of(kind: Kind, *, blanks: float = 0.0, groups: int = 0, count: int = 60) -> RunFacts:
    results = results_of(kind, NAMES, count, blanks, groups)
    weights = replace(RUN.weights, classes=NAMES, task=results.evaluation.task)
    return replace(RUN, data="labels.csv", weights=weights, results=results)


@pytest.mark.parametrize(
    ("kind", "tag", "task", "metrics"),
    [
        (
            *("ordinal", "image-classification", "image-classification"),
            ["cohen_kappa", "accuracy", "balanced_accuracy", "f1", "mae"],
        ),
        (
            *("multilabel", "image-classification", "image-classification"),
            ["mean_average_precision", "roc_auc", "f1"],
        ),
        ("regression", None, "other", ["r_squared"]),
    ],
)
def test_the_hub_reads_the_front_matter_of_every_task(
    kind: Kind, tag: str | None, task: str, metrics: list[str]
):
    run = run_of(kind)
    data = ModelCard(model_card(run)).data
    assert getattr(data, "pipeline_tag", None) == tag
    assert data.metrics == metrics
    assert [result.metric_type for result in data.eval_results or ()] == metrics
    for result, name in zip(data.eval_results or (), run.results.evaluation.metrics, strict=True):
        assert result.task_type == task
        assert result.metric_value == pytest.approx(run.results.evaluation.metric(name), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("classification", "that classifies images into 3 classes: "),
        ("ordinal", "that classifies images into 3 ordered classes: "),
        ("multilabel", "that tells which of 3 labels apply to an image: "),
        ("regression", "that predicts 3 numbers from an image: "),
    ],
)
def test_it_states_the_task_and_every_metric_with_its_interval(kind: Kind, words: str):
    run = run_of(kind)
    texts = visible_texts(parse(model_card(run)))
    assert words in " ".join(texts)
    for score in run.results.scores:
        assert texts[texts.index(score.title) + 1] == score.text
        assert score.interval in score.text
        assert " to " in score.interval
    assert "Ranges are 95% confidence intervals, by resampling 60 images." in texts
    # The name with Markdown in it is the first cell of a row of its table.
    assert NAMES[2] in texts


def test_labels_and_numbers_have_their_table():
    texts = visible_texts(parse(model_card(run_of("multilabel"))))
    header = texts.index("label")
    assert texts[header : header + 9][4:] == ["threshold", "precision", "recall", "apply", "known"]
    assert {texts[header + 9 * i] for i in (1, 2, 3)} == set(NAMES)
    texts = visible_texts(parse(model_card(run_of("regression"))))
    header = texts.index("number")
    assert [texts[header + 8 * i + 1] for i in range(4)] == ["unit", *["years"] * 3]


def test_limits_follow_the_task():
    def limits(kind: Kind, **options: float) -> str:
        run = run_of(kind, **options)
        return model_card(run).partition("## Limits")[2].partition("## Use")[0]

    optimistic = "thresholds were chosen on the validation images, so F1, precision and recall"
    assert optimistic in limits("multilabel")
    assert not any(optimistic in limits(kind) for kind in ("classification", "regression"))
    unknown = int(np.isnan(run_of("multilabel", blanks=0.3).results.evaluation.labels).sum())
    assert f"{unknown} of 180 labels are unknown" in limits("multilabel", blanks=0.3)
    assert "are unknown" not in limits("multilabel")
    assert "numbers are unknown" in limits("regression", blanks=0.3)
    assert "one of the 3 classes, even if it shows none" in limits("ordinal")
    assert "gets 3 numbers, even if" in limits("regression")
    assert "of only 7 groups" in limits("regression", groups=7)
    assert "groups" not in limits("regression", groups=30)
    assert "3 of 3 labels apply to fewer than 30 validation images" in limits("multilabel")
    assert "fewer than" not in limits("multilabel", count=200)


@pytest.mark.parametrize("kind", ["classification", "ordinal", "multilabel", "regression"])
def test_the_python_code_runs_and_prints_what_the_network_predicts(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(kind)
    task = run.weights.task
    outputs = task.num_outputs(len(NAMES))
    head = Stage("head", LinearHead(outputs), "vector")
    stages = Stage("pool", GlobalAveragePool(), "vector"), head
    model = Model("colors", stages, Preprocess(16, 16))
    variables = abstract_variables(model)
    # Whatever the image, the outputs are these.
    values = {"ordinal": [2, -1], "regression": [-1, 0, 2]}.get(kind, [-3, 3, 1])
    kernel = np.zeros((3, outputs), np.float32)
    variables["params"]["head"] = _set(variables["params"]["head"], kernel, values)
    save(tmp_path / "best", Pretrained(model, variables, run.weights))
    Image.new("RGB", (20, 20)).save(tmp_path / "PHOTO.jpg")

    monkeypatch.chdir(tmp_path)
    _, python = code(model_card(replace(run, workdir="best")))
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(python, "README.md", "exec"), {})
    expected = {
        "classification": "dog",
        "ordinal": "dog",
        "multilabel": f"dog 0.95257413\n{NAMES[2]} 0.7310586",
        "regression": f"cat 30.0\ndog 40.0\n{NAMES[2]} 60.0",
    }
    assert printed.getvalue().strip() == expected[kind]


def _set(head: dict, kernel: np.ndarray, bias: list[float]) -> dict:
    arrays = {"kernel": kernel, "bias": np.array(bias, np.float32)}
    return {
        name: _set(leaf, kernel, bias) if isinstance(leaf, dict) else arrays[name]
        for name, leaf in head.items()
    }
