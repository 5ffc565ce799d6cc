"""``tljax``, and how quickly every command explains itself."""

import os
import resource
import statistics
import subprocess
import sys
from unittest import mock

import pytest

from tljax.commands import COMMANDS, main


def processor_seconds(*arguments: str) -> float:
    """Seconds of the processor: a machine that is busy elsewhere does not make it slow."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "usage: tljax" in done.stdout or "--help" not in arguments
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "train")) for name in COMMANDS]
)
def test_help_takes_less_than_twice_as_long_as_importing_its_parser(name: str):
    turns = [
        (processor_seconds("-m", "tljax", name, "--help"), processor_seconds("-c", "import tyro"))
        for _ in range(7)
    ]
    ours, parser = map(statistics.median, zip(*turns, strict=True))
    assert ours < 2 * parser


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    with mock.patch.object(sys, "argv", ["tljax", *arguments]):
        try:
            main()
        except SystemExit as done:
            return int(done.code or 0), *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_no_command_and_help_list_them(capsys):
    for arguments in ((), ("-h",), ("--help",)):
        code, out, err = ended(capsys, *arguments)
        assert (code, err) == (0, "")
        assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("word", "said"),
    [("trian", "did you mean train? --help"), ("x", "--help"), ("--train", "did you mean train?")],
)
def test_an_unknown_command_is_one_line_with_the_nearest(capsys, word, said):
    code, out, err = ended(capsys, word, "--epochs", "3")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: unknown command '{word}'; {said}")
    assert len(err.splitlines()) == 1


def test_a_renamed_flag_is_refused_with_its_new_name(capsys):
    for words in (["--average", "0.9"], ["--average=0.9"]):
        assert ended(capsys, "train", *words) == (
            2, "", "error: --average was renamed: use --ema-decay\n",
        )  # fmt: skip
    assert "typeguard" not in sys.modules or hasattr(sys.modules["typeguard"], "typechecked")
