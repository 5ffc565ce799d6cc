"""Commands without a device, memory, an output or a terminal."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import pytest

from tljax.commands import cli

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config(cli.Common):
    """Do something."""


def end(run, *arguments: str) -> int:
    """Return the exit code of a command that calls ``run``."""
    with mock.patch.object(sys, "argv", ["command", *arguments]), mock.patch("sys.exit") as ended:
        cli.main(Config, run)
    return ended.call_args.args[0] if ended.called else 0


def failing(error: BaseException):
    def run(_: Config):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory: halve --batch-size, or use --precision bfloat16"),
        (MemoryError("Unable to allocate"), "out of memory: halve --batch-size, or use"),
        (AssertionError(), f"AssertionError: in {__file__}, line "),
        (RecursionError("too deep"), "RecursionError: too deep (--debug shows where)"),
        (ValueError("one\n  two"), "ValueError: one two (--debug shows where)"),
        (FileNotFoundError(2, "No such file", "x"), "FileNotFoundError: [Errno 2] No such file: "),
    ],
)
def test_every_failure_is_one_line_with_a_message(capsys, error, said):
    assert end(failing(error)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unknown backend nonsense")])
def test_a_missing_device_is_named(capsys, monkeypatch, error):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=error))
    assert end(failing(error)) == 2
    assert capsys.readouterr().err == (
        "error: JAX finds no device for JAX_PLATFORMS=cuda: unset it, or set it to cpu\n"
    )


def test_characters_that_an_output_cannot_encode_are_escaped(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def run(_: Config):
        print("café")
        print("Müller", file=sys.stderr)
        return {"name": "œuf"}

    assert end(run, "--json") == 0
    err.flush()
    lines = out.buffer.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert lines[0] == rb"caf\xe9"
    assert json.loads(lines[1]) == {"name": "œuf"}
    assert err.buffer.getvalue() == b"M\\xfcller\n"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_full_output_is_one_line(capsys, monkeypatch):
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        code = end(lambda _: print("much"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert code == 1
    said = capsys.readouterr().err
    assert said == "error: the output cannot be written (No space left on device)\n"


LIST = f"{sys.executable} {ROOT / 'scripts' / 'weights.py'} list"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "err", "out"),
    [
        (f"{LIST} >&-", 0, 0, 0),
        (f"{LIST} 2>&-", 0, 0, 50),
        (f"{LIST} --json >&- 2>&-", 0, 0, 0),
        (f"{LIST} >/dev/full", 1, 1, 0),
        (f"LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {LIST}", 0, 0, 50),
        (f"PYTHONIOENCODING=ascii {LIST.removesuffix('list')} --help", 0, 0, 10),
        (f"COLUMNS=1 {LIST.removesuffix('list')} --help", 0, 0, 10),
        (f"COLUMNS=1 PYTHONIOENCODING=ascii {LIST} --bogus 1", 2, 1, 0),
        (f"{LIST} --bogus 1 2>&-", 2, 0, 0),
        (f"TMPDIR=/nonexistent {LIST}", 0, 0, 50),
        (f"HOME=/nonexistent TLJAX_CACHE= {LIST}", 0, 0, 50),
        (f"mkdir gone && cd gone && rmdir ../gone && {LIST}", 0, 0, 50),
    ],
)
def test_a_command_without_outputs_or_folders(tmp_path, command, code, err, out):
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "TLJAX_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == err, done.stderr
    assert len(done.stdout.splitlines()) >= out
    assert out or not done.stdout
    assert not list(tmp_path.iterdir())
