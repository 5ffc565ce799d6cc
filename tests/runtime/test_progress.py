"""Progress bars on pipes and on a terminal that records its output."""

import io
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tljax.runtime.progress import track

HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def remaining(self) -> str:
        """Return the visible text after the bars have erased themselves."""
        drawn, erased, rest = self.getvalue().rpartition(ERASE_LINE)
        assert drawn
        assert erased
        return rest


@contextmanager
def on_terminal() -> Iterator[Terminal]:
    """Replace stderr by a terminal, and check that a bar restores it."""
    terminal = Terminal()
    threads = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "stderr", terminal)
        yield terminal
        assert sys.stderr is terminal, "a bar still redirects stderr"
    assert terminal.getvalue().count(HIDE_CURSOR) == terminal.getvalue().count(SHOW_CURSOR)
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive(), "a bar still refreshes"


def fail_in_loop() -> None:
    for item in track(range(3), description="train", total=3):
        print(1 / item)


def test_a_pipe_gets_one_line_at_the_end(capsys: pytest.CaptureFixture[str]):
    batches = [[0] * 8, [0] * 8, [0] * 3]
    seen = []
    for batch in track(batches, description="features", total=19, size=len):
        seen.append(batch)
        assert capsys.readouterr() == ("", "")
    assert all(a is b for a, b in zip(seen, batches, strict=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"features  19 images  \d+\.\d s  \d+(\.\d)? images/s\n", err)


def test_the_speed_is_units_over_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("tljax.runtime.progress.time.perf_counter", lambda: next(clock))
    list(track(range(5), description="train", total=None, unit="steps", size=lambda _: 2))
    assert capsys.readouterr().err == "train  10 steps  4.0 s  2.5 steps/s\n"


def test_a_loop_without_batches(capsys: pytest.CaptureFixture[str]):
    assert list(track([], description="train", total=0)) == []
    assert capsys.readouterr().err == "train  0 images  0.0 s  0.0 images/s\n"


def test_a_quiet_loop_shows_nothing():
    with on_terminal() as terminal:
        assert list(track(range(3), description="train", total=3, quiet=True)) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_an_interrupted_loop_prints_no_line(capsys: pytest.CaptureFixture[str]):
    next(track(range(3), description="train", total=3))
    with pytest.raises(ZeroDivisionError):
        fail_in_loop()
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_and_then_the_line():
    with on_terminal() as terminal:
        list(track(range(10), description="train [bold]", total=80, size=lambda _: 8))
    assert "80/80 images" in terminal.getvalue()
    assert re.fullmatch(r"train \[bold\]  80 images .* images/s\n", terminal.remaining())


def test_an_unknown_total_is_shown_as_a_question_mark():
    with on_terminal() as terminal:
        list(track(range(3), description="train", total=None))
    assert "3/? images" in terminal.getvalue()


def test_the_terminal_is_clean_after_an_early_exit():
    with on_terminal() as terminal:
        loop = track(range(3), description="train", total=3)
        next(loop)
        assert sys.stderr is not terminal
        del loop
    assert terminal.remaining() == ""


def test_the_terminal_is_clean_after_an_error_in_the_loop():
    with on_terminal() as terminal, pytest.raises(ZeroDivisionError):
        fail_in_loop()
    assert terminal.remaining() == ""


def test_the_terminal_is_clean_after_an_error_in_the_iterable():
    with on_terminal() as terminal, pytest.raises(ZeroDivisionError):
        list(track((1 / n for n in (1, 0)), description="train", total=2))
    assert terminal.remaining() == ""


def test_nested_bars_followed_by_another_bar():
    with on_terminal() as terminal:
        for _ in track(range(2), description="epochs", total=2, unit="epochs"):
            list(track(range(3), description="train", total=3))
        list(track(range(4), description="features", total=4))
    lines = re.findall(r"(train|epochs|features)  (\d) \w+  [\d.]+ s", terminal.getvalue())
    assert lines == [("train", "3"), ("train", "3"), ("epochs", "2"), ("features", "4")]


def test_output_for_other_programs_stays_on_stdout(capsys: pytest.CaptureFixture[str]):
    with on_terminal() as terminal:
        for _ in track(range(1), description="train", total=1):
            print('{"top1": 1.0}')
    assert capsys.readouterr().out == '{"top1": 1.0}\n'
    assert "top1" not in terminal.getvalue()
