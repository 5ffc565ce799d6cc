"""The report: its contents, the escaping of all text, and files that are complete or absent."""

import base64
import hashlib
import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import KINDS, evaluation_of, of_confusion, results_of, source_of
from PIL import Image

from tljax.metrics.bootstrap import Interval
from tljax.report.figures import Sweep
from tljax.report.mistakes import Mistake, worst_mistakes
from tljax.report.page import Report, write_report
from tljax.report.results import ClassResult, Results, per_class, summarize, worst_pairs
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task

VOID = {"meta", "img", "input"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Parse a page, and fail if tags do not match."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_bytes().decode()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (path of open tags, text)
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((" ".join(self.open), data))

    def texts_of(self, tag: str) -> list[str]:
        return [text for path, text in self.texts if path.endswith(f" {tag}")]

    def text_inside(self, tag: str) -> str:
        return "".join(text for path, text in self.texts if f" {tag}" in path)

    def pictures(self) -> list[tuple[dict[str, str | None], Image.Image]]:
        pictures = []
        for tag, attributes in self.tags:
            if tag == "img":
                source = attributes["src"] or ""
                head, data = source.split(",")
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                assert head == f"data:image/{(image.format or '').lower()};base64"
                pictures.append((attributes, image))
        return pictures


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(
        title="resnet50 on ants & bees",
        headline=[("probe accuracy", "94.1%", "89.3% to 97.2%"), ("images", "153", "")],
        caption="Ranges are 95% confidence intervals.",
        notes=["Only 153 images were held out."],
        history=[{"epoch": 1, "phase": "probe", "train_loss": 1.0, "val_top1": float("nan")}],
        sweep=Sweep([0.1, 1.0], [0.8, 0.9], 1.0),
        results=of_confusion(np.array([[8, 2], [1, 9]]), ["ants", EVIL]),
        mistakes=[
            Mistake(noise(400, 600), "val/1.jpg", "ants", EVIL, "98.7%"),
            Mistake(noise(8, 8), "caf\udce9.jpg", EVIL, "ants", "3.0%", "missed", "age"),
        ],
        skipped=[("train/imageNotFound.gif", "not a photograph")],
        details={"model": {"name": "resnet50", "input": "224 x 224"}},
        next_steps=["tljax predict --workdir 'runs/a b' <photo>"],
    )


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, report)
    return Page(path)


def test_all_sections_are_there_in_order(report: Report, page: Page):
    assert page.texts_of("title") == page.texts_of("h1") == ["resnet50 on ants & bees"]
    assert page.texts_of("h2") == [
        "Training",
        "Confusion matrix",
        "Classes",
        "Worst mistakes",
        "Skipped files",
        "Details",
        "What to do next",
    ]
    assert page.texts_of("dt") == ["probe accuracy", "images"]
    assert page.texts_of("dd") == ["94.1%", "89.3% to 97.2%", "153"]
    assert page.texts_of("p") == [report.caption, *report.notes]
    assert page.texts_of("pre") == report.next_steps
    text = " ".join(page.text_inside("body").split())
    assert f"val/1.jpg is ants, predicted {EVIL} (98.7%)" in text
    assert f"caf\\udce9.jpg age is {EVIL}, missed ants (3.0%)" in text
    cells = page.texts_of("td")
    assert cells[:4] == ["ants", "8 of 10", "80.0%", EVIL]
    assert cells[4:8] == [EVIL, "9 of 10", "90.0%", "ants"]
    assert cells[8:10] == list(report.skipped[0])
    assert cells[10:] == ["name", "resnet50", "input", "224 x 224"]


def test_the_page_requests_nothing_and_allows_no_script_but_its_own(page: Page):
    tags = [tag for tag, _ in page.tags]
    assert not {"link", "iframe", "object", "base"} & set(tags)
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import", page.html)
    (script,) = page.texts_of("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
    contents = [attributes.get("content") or "" for tag, attributes in page.tags if tag == "meta"]
    assert f"{policy} 'sha256-{digest}'" in [" ".join(content.split()) for content in contents]


def test_pictures_decode_and_have_their_sizes(report: Report, page: Page):
    *plots, (photo_attributes, photo), (digit_attributes, digit) = page.pictures()
    assert len(plots) == 3
    for attributes, plot in plots:
        size = [2 * int(attributes[side] or 0) for side in ("width", "height")]
        np.testing.assert_allclose(plot.size, size, atol=2)
        assert attributes["alt"]
        assert plot.getchannel("A").getextrema() == (0, 255)  # dark pages show through
    assert photo.size == (320, 213)
    assert photo.format == "JPEG"
    assert photo_attributes["alt"] == "Image labeled ants"
    assert digit_attributes["class"] == "pixels"
    np.testing.assert_array_equal(np.asarray(digit), report.mistakes[1].image)


def test_empty_fields_have_no_section(tmp_path: Path):
    write_report(tmp_path / "report.html", Report(title="nothing"))
    page = Page(tmp_path / "report.html")
    assert [text for path, text in page.texts if path.endswith("body")] == ["\n", "\n", "\n"]
    assert page.texts_of("h1") == ["nothing"]
    assert not page.texts_of("h2")
    assert not page.pictures()


def test_calibration_and_duplicates_are_shown(tmp_path: Path):
    results = results_of("classification", ["a", "b", "c", "d"])
    pairs = [(f"val/{i}.jpg", EVIL, "mirrored", 0.9876) for i in range(21)]
    path = tmp_path / "report.html"
    write_report(path, Report(title="leaky", results=results, duplicates=pairs))
    page = Page(path)
    assert page.texts_of("h2")[-2:] == ["Calibration", "Seen in training"]
    *_, (attributes, _) = page.pictures()
    assert attributes["alt"] == "Accuracy over confidence"
    text, filter_ = page.texts_of("p")
    assert results.calibration is not None
    assert f"The temperature is {results.calibration.temperature:.3g}." in text
    assert filter_ == "Validation images seen in training: 21 rows"
    cells = page.texts_of("td")
    assert cells[cells.index("val/0.jpg") :][:4] == ["val/0.jpg", EVIL, "mirrored", "0.988"]


def test_classes_without_examples(tmp_path: Path):
    write_report(
        tmp_path / "report.html",
        Report(title="empty", results=of_confusion(np.array([[0, 0], [1, 0]]), ["a", "b"])),
    )
    assert Page(tmp_path / "report.html").texts_of("td") == [
        *("b", "0 of 1", "0.0%", "a"),
        *("a", "0 of 0", "none"),
    ]


anything = st.text(st.characters(exclude_characters="\0"), min_size=1) | st.sampled_from(
    [
        EVIL,
        "</title>",
        "&lt;",
        "{body}",
        "'\"><img src=x onerror=alert(1)>",
        "caf\udce9",
        "]]>",
        "\u202egpj.exe",
        "x" * 300,
    ]
)


@settings(max_examples=50, deadline=None)
@given(anything)
def test_any_text_is_shown_as_it_is(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report = Report(
        title=text,
        headline=[(text, text, text)],
        caption=text,
        notes=[text],
        mistakes=[Mistake(noise(2, 2), text, text, text, text, subject=text)],
        skipped=[(text, text)],
        details={text: {text: text}},
        next_steps=[text],
    )
    write_report(path, report)
    page = Page(path)
    visible = text.encode("utf-8", "backslashreplace").decode()
    for tag, times in [("h1", 1), ("dt", 1), ("dd", 2), ("p", 2), ("b", 2), ("h3", 1), ("pre", 1)]:
        assert page.texts_of(tag) == [visible] * times
    assert page.texts_of("figcaption")[-1] == f" ({visible})"
    assert page.texts_of("td") == [visible] * 4
    assert page.texts_of("bdi") == [visible]
    plain = replace(report, title="", headline=[("", "", "x")], notes=[""], skipped=[("", "")])
    plain = replace(plain, details={"": {"": ""}}, next_steps=[""])
    plain = replace(plain, mistakes=[Mistake(noise(2, 2), "", "", "")])
    write_report(path, plain)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(path).tags]
    labels = [attributes.get("aria-label") for _, attributes in page.tags]
    assert {name for name in labels if name} <= {"Skipped files", visible}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_per_class_counts_examples(pairs: list[tuple[int, int]]):
    confusion = np.zeros((4, 4), int)
    for pair in pairs:
        confusion[pair] += 1
    results = per_class(confusion, ["a", "b", "c", "d"])
    assert sorted(result.name for result in results) == ["a", "b", "c", "d"]
    for name, examples, correct, most_confused_with in results:
        label = "abcd".index(name)
        predictions = Counter("abcd"[p] for t, p in pairs if t == label)
        assert examples == predictions.total()
        assert correct == predictions.pop(name, 0)
        assert predictions[most_confused_with or ""] == max(predictions.values(), default=0)
    with_examples = [r.correct / r.examples for r in results if r.examples]
    assert with_examples == sorted(with_examples)
    assert not any(r.examples for r in results[len(with_examples) :])


def test_per_class_puts_the_more_certain_failure_first():
    confusion = np.array([[0, 1, 0], [5, 0, 4], [0, 0, 2]])
    assert per_class(confusion, ["rare", "common", "fine"]) == [
        ClassResult("common", 9, 0, "rare"),
        ClassResult("rare", 1, 0, "common"),
        ClassResult("fine", 2, 2, None),
    ]


def test_worst_pairs_are_sorted_by_count_then_by_share():
    confusion = np.array([[5, 2, 0], [3, 0, 2], [0, 2, 20]])
    assert worst_pairs(confusion, ["a", "b", EVIL]) == [
        ("b", "a", 3, 3 / 5),
        ("b", EVIL, 2, 2 / 5),
        ("a", "b", 2, 2 / 7),
        (EVIL, "b", 2, 2 / 22),
    ]
    assert worst_pairs(np.eye(2, dtype=int), ["a", "b"]) == []


def imagenet_like(rng: np.random.Generator) -> np.ndarray:
    """Return the confusion of 50,000 images of 1,000 classes, a quarter of them wrong."""
    confusion = np.zeros((1000, 1000), int)
    for label in range(1000):
        similar = (label + np.arange(1, 20)) % 1000
        predicted = np.where(rng.random(50) < 0.75, label, rng.choice(similar, 50))
        np.add.at(confusion[label], predicted, 1)
    return confusion


@pytest.mark.slow
def test_a_thousand_classes_and_50000_images_stay_below_5_mb(tmp_path: Path):
    rng = np.random.default_rng(0)
    confusion = imagenet_like(rng)
    assert confusion.sum() == 50_000
    classes = [f"n{i:08d} a common name of class number {i}" for i in range(1000)]
    classes[:3] = [EVIL, "\u202eright to left\u202c", "x" * 300]
    report = Report(
        title="many",
        history=[{"epoch": i, "train_loss": 1 / (1 + i), "val_top1": 0.5} for i in range(300)],
        results=of_confusion(confusion, classes),
        mistakes=[Mistake(noise(224, 224, i), f"{i}.jpg", "a", "b", "50%") for i in range(16)],
        duplicates=[(f"val/{i:05d}.jpeg", f"train/{i}.jpeg", "near", 0.9) for i in range(9_000)],
        skipped=[(f"train/{i:05d}.jpeg", "not an image") for i in range(50_000)],
    )
    write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").stat().st_size < 5e6
    page = Page(tmp_path / "report.html")
    pairs = len(worst_pairs(confusion, classes))
    assert [text for text in page.texts_of("p") if "rows" in text] == [
        f"Confused classes, the most frequent first: {pairs:,} rows, 1,000 shown",
        "Classes, the lowest accuracy first: 1,000 rows",
        "Validation images seen in training: 9,000 rows, 1,000 shown",
        "Skipped files: 50,000 rows, 1,000 shown",
    ]
    assert len([text for text in page.texts_of("td") if " of 50" in text]) == 1000
    worst = page.texts_of("td")[:2]
    label, predicted = map(classes.index, worst)
    np.fill_diagonal(confusion, 0)
    assert confusion[label, predicted] == confusion.max()


def test_a_hundred_classes_with_pictures_stay_small(tmp_path: Path, report: Report):
    confusion = np.random.default_rng(0).multinomial(50, [0.01] * 100, 100)
    classes = [f"class number {i}" for i in range(100)]
    mistakes = [Mistake(noise(300, 400, i), f"{i}.jpg", "a", "b", "50%") for i in range(16)]
    history = [{"epoch": i, "train_loss": 1 / (1 + i), "val_top1": 0.5} for i in range(100)]
    results = of_confusion(confusion, classes)
    report = replace(report, results=results, mistakes=mistakes, history=history)
    write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").stat().st_size < 3e6  # noise is the worst case for JPEG


@pytest.mark.parametrize("failing", ["write_text", "replace"])
def test_a_write_that_fails_leaves_the_old_page(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "report.html"
    write_report(path, Report(title="old"))
    old = path.read_bytes()

    def disk_full(self: Path, *args: object, **kwargs: object) -> None:
        self.write_bytes(b"<!DOCTYPE html><ht")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, failing, disk_full)
    with pytest.raises(RequestError, match="No space"):
        write_report(path, Report(title="new"))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_is_replaced_completely(tmp_path: Path):
    path = tmp_path / "report.html"
    for title in ("old", "new"):
        write_report(path, Report(title=title))
    assert Page(path).texts_of("h1") == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_confusion_that_does_not_fit_writes_nothing(tmp_path: Path):
    report = Report(title="wrong", results=of_confusion(np.eye(2, dtype=int), ["a"]))
    with pytest.raises(RequestError, match="for 1 classes"):
        write_report(tmp_path / "report.html", report)
    assert not list(tmp_path.iterdir())


# Tasks


def page_of(kind: Kind, results: Results, folder: Path) -> Page:
    source = source_of(results.evaluation, results.names)
    report = Report(
        title=kind,
        headline=[score[:3] for score in results.scores],
        kind=kind,
        results=results,
        mistakes=worst_mistakes(results.evaluation, source, results.names),
    )
    write_report(folder / "report.html", report)
    return Page(folder / "report.html")


def test_every_task_has_its_sections_and_metrics(tmp_path: Path):
    classes = ["Confusion matrix", "Classes", "Worst mistakes"]
    expected: dict[Kind, tuple[list[str], list[str]]] = {
        "classification": (
            [*classes, "Calibration"],
            ["top-1 accuracy", "balanced accuracy", "macro F1", "AUROC, one versus rest"],
        ),
        "ordinal": (
            classes,
            [
                *("quadratic kappa", "accuracy", "balanced accuracy", "macro F1"),
                "mean distance in classes",
            ],
        ),
        "multilabel": (
            ["Labels", "Worst mistakes", "Calibration"],
            ["mAP", "AUROC", "macro F1"],
        ),
        "regression": (
            ["Numbers", "Worst mistakes"],
            ["R2"],
        ),
    }
    for kind in KINDS:
        page = page_of(kind, results_of(kind, ["a", "b", EVIL]), tmp_path)
        assert (page.texts_of("h2"), page.texts_of("dt")) == expected[kind]
        # Every metric has its interval.
        assert len(page.texts_of("dd")) == 2 * len(page.texts_of("dt"))


def test_the_labels_are_listed_with_thresholds_and_counts(tmp_path: Path):
    results = results_of("multilabel", ["cat", "dog", EVIL], blanks=0.2)
    page = page_of("multilabel", results, tmp_path)
    values, interval = results.per_name, results.per_name_intervals["average_precision"]
    rows = np.array(page.texts_of("td")).reshape(3, 9)
    assert sorted(rows[:, 0]) == sorted(results.names)
    assert (np.diff([float(row[1].split("%")[0]) for row in rows]) >= 0).all()
    i = results.names.index(EVIL)
    (row,) = rows[rows[:, 0] == EVIL]
    assert list(row[1:]) == [
        f"{values['average_precision'][i]:.1%} ({interval.low[i]:.1%} to {interval.high[i]:.1%})",
        f"{values['auroc'][i]:.1%}",
        f"{values['f1'][i]:.1%}",
        f"{results.evaluation.task.thresholds[i]:.3f}",
        f"{values['precision'][i]:.1%}",
        f"{values['recall'][i]:.1%}",
        str(np.nansum(results.evaluation.labels[:, i]).astype(int)),
        str(np.isfinite(results.evaluation.labels[:, i]).sum()),
    ]


def test_a_label_that_never_applies_has_undefined_metrics(tmp_path: Path):
    evaluation = evaluation_of("multilabel", 2)
    evaluation.labels[:, 1] = 0
    names = ["cat", "dog"]
    results = summarize(evaluation, source_of(evaluation, names), names)
    page = page_of("multilabel", results, tmp_path)
    cells = page.texts_of("td")
    assert cells[9:12] == ["dog", "undefined", "undefined"]


def test_the_numbers_are_listed_with_their_units_and_ranges(tmp_path: Path):
    results = results_of("regression", ["age", EVIL], blanks=0.2)
    page = page_of("regression", results, tmp_path)
    values, interval = results.per_name, results.per_name_intervals["mae"]
    rows = np.array(page.texts_of("td")).reshape(2, 8)
    for i, row in enumerate(rows):
        known = results.evaluation.labels[:, i]
        known = known[~np.isnan(known)]
        assert list(row) == [
            results.names[i],
            "years",
            f"{values['mae'][i]:.3g} ({interval.low[i]:.3g} to {interval.high[i]:.3g})",
            f"{values['rmse'][i]:.3g}",
            f"{values['r2'][i]:.3g}",
            f"{known.min():.3g}",
            f"{known.max():.3g}",
            str(len(known)),
        ]
    alts = [attributes["alt"] for attributes, _ in page.pictures()]
    assert alts[:2] == [f"Predicted over true {name}, and residuals" for name in results.names]


def test_a_thousand_labels_and_50000_images_stay_below_5_mb(tmp_path: Path):
    names = [f"label {i} {EVIL}" for i in range(1000)]
    rng = np.random.default_rng(0)
    shares = np.sort(rng.random((5, 1000)), axis=0)
    counts = rng.integers(0, 50_000, 1000)
    evaluation = evaluation_of("multilabel", 2)
    evaluation = replace(evaluation, task=Task("multilabel"))  # without thresholds
    interval = Interval(shares[0], shares[2])
    results = Results(
        evaluation,
        names,
        per_name=dict(
            zip(
                ("average_precision", "auroc", "f1", "precision", "recall", "known", "positive"),
                (*shares, np.full(1000, 50_000), counts),
                strict=True,
            )
        ),
        per_name_intervals={"average_precision": interval},
    )
    write_report(tmp_path / "report.html", Report(title="many", results=results))
    assert (tmp_path / "report.html").stat().st_size < 2e6
    page = Page(tmp_path / "report.html")
    assert page.texts_of("p") == ["Labels, the lowest average precision first: 1,000 rows"]


@pytest.mark.slow
def test_a_million_numbers_are_drawn_in_a_small_page(tmp_path: Path):
    evaluation = evaluation_of("regression", 20, 50_000)
    names = [f"number {i}" for i in range(20)]
    page = page_of(
        "regression", Results(evaluation, names, per_name=evaluation.per_name()), tmp_path
    )
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert len(page.pictures()) == 8 + 16
