"""The report in a browser: nothing is cut off, everything can be reached by keyboard and read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import EXECUTABLE, Tab, chromium
from made_up import of_confusion, results_of

from tljax.report.figures import Sweep
from tljax.report.mistakes import Mistake
from tljax.report.page import Report, write_report
from tljax.report.results import Results

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium on this machine: apt-get install chromium"
)

HOSTILE = (
    "<script>window.attacked = 1</script>",
    "<img src=x onerror='window.attacked = 1'>",
    '"><b onclick="window.attacked = 1">',
    "\u202eright to left\u202c",
    "\u05d0\u05d1\u05d2 \u0639\u0631\u0628\u064a",
    "x" * 300,
    "caf\udce9",
)
NAMES = (*HOSTILE, *(f"class number {i}" for i in range(120 - len(HOSTILE))))


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (224, 224, 3), np.uint8)


def results(case: str) -> Results:
    if case == "5 classes":
        return results_of("classification", NAMES[:5])
    if case == "120 classes":  # 50 examples of each, a quarter of them wrong
        rng = np.random.default_rng(0)
        shares = 0.75 * np.eye(120) + 0.25 / 120
        confusion = np.array([rng.multinomial(50, share) for share in shares])
        return of_confusion(confusion, NAMES)
    if case == "120 labels":
        return results_of("multilabel", NAMES, blanks=0.1, groups=7)
    return results_of("regression", NAMES[:12], blanks=0.1, units=NAMES[:12])


def report(case: str) -> Report:
    measured = results(case)
    names = measured.names
    phases = ("probe", *["train"] * 8)
    kind = measured.kind
    return Report(
        title=f"digits with {HOSTILE[0]}",
        headline=[
            ("probe accuracy", "94.1%", ""),
            *(score[:3] for score in measured.scores),
            ("seconds", "83", ""),
        ],
        caption=measured.how_intervals,
        notes=[f"Only 153 images of {HOSTILE[5]} were held out.", HOSTILE[3]],
        history=[
            {
                "epoch": i,
                "phase": phase,
                "train_loss": 1 / (1 + i),
                "val_loss": 1,
                **{f"val_{name}": 0.9 for name in measured.evaluation.metrics},
            }
            for i, phase in enumerate(phases)
        ],
        kind=kind,
        sweep=Sweep([0.1, 1.0, 10.0], [0.8, 0.9, 0.85], 1.0, is_loss=kind == "regression"),
        results=measured,
        mistakes=[
            Mistake(noise(i), name, names[i % len(names)], names[-1], "90.0%", subject=name)
            for i, name in enumerate((*HOSTILE, "val/1.jpg"))
        ],
        duplicates=[(name, HOSTILE[5], "near", 0.98) for name in HOSTILE],
        skipped=[(HOSTILE[i % len(HOSTILE)], "not an image") for i in range(30)],
        details={"Environment": {"jax": "0.10.2", "SHA-256": "ab" * 32, HOSTILE[5]: HOSTILE[5]}},
        next_steps=[f"tljax predict PHOTO.jpg --weights '{HOSTILE[5]}'"],
    )


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module", params=["5 classes", "120 classes", "120 labels", "12 numbers"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, report(request.param))
    return path


# The elements that leave the window to a side, unless a box around them scrolls.
CUT_OFF = """[...document.body.querySelectorAll("*")].filter((element) => {
  const {left, right} = element.getBoundingClientRect();
  return !element.closest(".table, .plot") && (left < -1 || right > innerWidth + 1);
}).map((element) => element.outerHTML.slice(0, 200))"""

# The boxes that hold more than they show and do not scroll.
STUCK = """[...document.body.querySelectorAll("*")].filter((element) =>
  element.scrollWidth > element.clientWidth + 1 && element.clientWidth
  && getComputedStyle(element).overflowX !== "auto"
  && !element.closest(".table, .plot")
).map((element) => element.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("width", [1300, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_and_the_console_is_empty(tab: Tab, path: Path, width: int, scheme: str):
    tab.open(path, width, scheme)
    root = "document.documentElement"
    assert tab.evaluate(f"{root}.scrollWidth") <= tab.evaluate(f"{root}.clientWidth") <= width
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate(STUCK) == []
    assert not tab.evaluate(
        "[...document.querySelectorAll('table')].some(t => !t.closest('.table'))"
    )
    assert tab.console == []


def test_hostile_names_are_text(tab: Tab, path: Path):
    tab.open(path, 1300)
    assert tab.evaluate("window.attacked") is None
    assert tab.evaluate("document.scripts.length") == 1
    assert tab.evaluate("document.querySelectorAll('[onclick], [onerror], b b').length") == 0
    heading = tab.evaluate("document.querySelector('h1').textContent")
    assert heading == tab.evaluate("document.title") == f"digits with {HOSTILE[0]}"
    cells = tab.evaluate("[...document.querySelectorAll('td')].map(cell => cell.textContent)")
    assert {name.encode("utf-8", "backslashreplace").decode() for name in HOSTILE} <= set(cells)


def test_every_picture_is_loaded_and_described(tab: Tab, path: Path):
    tab.open(path, 400)
    pictures = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(pictures) >= 4 + len(HOSTILE)
    assert all(complete and width and alt for complete, width, alt in pictures)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_that_scrolls_or_takes_text_is_reached_by_tab(tab: Tab, path: Path, scheme: str):
    tab.open(path, 400, scheme)
    targets = tab.evaluate(
        "window.targets = [...document.querySelectorAll('.table, .plot, input')], targets.length"
    )
    assert targets >= 8
    for expected in range(targets):
        tab.press_tab()
        assert tab.evaluate("targets.indexOf(document.activeElement)") == expected
        style = "getComputedStyle(document.activeElement)"
        assert tab.evaluate(f"[{style}.outlineStyle, {style}.outlineWidth]") == ["solid", "2px"]
        assert tab.evaluate("document.activeElement.getAttribute('aria-label').length > 0")


def test_a_filter_leaves_the_rows_that_contain_the_text(tab: Tab, path: Path):
    tab.open(path, 400)
    tab.evaluate("document.querySelector('[aria-label*=Skipped]').focus()")
    tab.type("<SCRIPT")
    rows = "[...document.querySelectorAll('[aria-label=\"Skipped files\"] tbody tr')]"
    visible = tab.evaluate(f"{rows}.filter(row => row.offsetHeight).map(row => row.textContent)")
    assert visible == [f"{HOSTILE[0]}not an image"] * 5


# The contrast of each text with its background, as WCAG 2 defines it.
CONTRAST = """(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => numbers(color).slice(0, 3)
    .map((c) => c / 255).map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (numbers(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const lowest = {};
  for (const element of document.body.querySelectorAll("*")) {
    const texts = [...element.childNodes].filter((node) => node.nodeType === 3);
    if (element.tagName === "SCRIPT" || !texts.length) continue;
    const pair = [getComputedStyle(element).color, background(element)].map(luminance);
    const ratio = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
    lowest[element.tagName] = Math.min(ratio, lowest[element.tagName] ?? 21);
  }
  return lowest;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_4_5(tab: Tab, path: Path, scheme: str):
    tab.open(path, 1300, scheme)
    contrasts = tab.evaluate(CONTRAST)
    assert {"H1", "TD", "TH", "P", "PRE", "BDI"} <= contrasts.keys()
    assert min(contrasts.values()) >= 4.5, contrasts
