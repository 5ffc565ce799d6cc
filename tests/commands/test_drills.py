"""Fault injection: an interrupted training continues to byte-identical results."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fake_bucket import needs_gcsfs, serve_bucket
from networks import random_pretrained
from PIL import Image

from tljax.pretrained import save

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ("best/model.safetensors", "metrics.jsonl", "split.csv", "classes.json", "skipped.csv")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a training command of seconds that writes a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("drill")
    save(folder / "net.safetensors", random_pretrained("mobilenetv2_050", 5))
    rng = np.random.default_rng(0)
    for i in range(20):
        path = folder / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    (folder / "data" / "a" / "broken.png").write_text("no picture")
    return [
        *(sys.executable, str(ROOT / "scripts" / "train.py"), "--data", str(folder / "data")),
        *("--weights", str(folder / "net.safetensors"), "--image-size", "32", "--epochs", "12"),
        *("--recipe", "finetune", "--train", "head", "--batch-size", "4", "--dropout", "0.2"),
        *("--checkpoint-minutes", "0", "--log-every", "1", "--workdir"),
    ]


def results(read: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return the results without the speed, which differs between any two runs."""
    return {name: re.sub(rb', "images_per_second": [^},]+', b"", read(name)) for name in RESULTS}


def start(command: list[str], workdir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TLJAX_CACHE": str(workdir.parent / "cache")},
    )


def finish(command: list[str], workdir: Path) -> dict[str, bytes]:
    process = start(command, workdir)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    return results(lambda name: (workdir / name).read_bytes())


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Return the results without an interruption, and the seconds after compilation."""
    folder = tmp_path_factory.mktemp("whole")
    finish(command, folder / "first")
    began = time.monotonic()
    return finish(command, folder / "second"), time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_that_is_interrupted_ten_times_has_the_same_result(
    command, whole, tmp_path, number
):
    expected, seconds = whole
    rng = np.random.default_rng(number)
    codes = []
    for moment in rng.uniform(0.1 * seconds, seconds, 10):
        process = start(command, tmp_path / "run")
        time.sleep(moment)
        process.send_signal(number)
        lines = process.communicate()[1].splitlines()
        codes.append(process.returncode)
        if process.returncode == 75:
            assert lines[-1].startswith("error: stopped by SIGTERM")
        assert not any("Traceback" in line for line in lines), lines
    # It may come before Python has started, or when all is over.
    allowed = {-signal.SIGKILL, 0} if number == signal.SIGKILL else {75, -signal.SIGTERM, 0}
    assert set(codes) <= allowed
    assert sum(code != 0 for code in codes) >= 3, codes
    if number == signal.SIGTERM:
        assert 75 in codes
    assert finish(command, tmp_path / "run") == expected


@needs_gcsfs
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_in_a_bucket_that_is_interrupted_while_it_saves_has_the_same_result(
    command, whole, tmp_path, number
):
    environment = {"TLJAX_CACHE": str(tmp_path / "cache")}
    stopped = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}[number]
    with serve_bucket() as storage, mock.patch.dict(os.environ, environment):
        for moment in np.random.default_rng(number).integers(1, 60, 6).tolist():
            writes = itertools.count(1)
            process = subprocess.Popen(
                [*command, "gs://bucket/run"], stderr=subprocess.PIPE, text=True
            )

            def interrupts(method, name, process=process, writes=writes, moment=moment):
                is_write = method != "GET" and name.startswith("run/checkpoints/")
                if is_write and next(writes) == moment:
                    process.send_signal(number)
                return False

            storage.refuses = interrupts
            error = process.communicate()[1]
            assert process.returncode == stopped, error
            assert "Traceback" not in error
        done = subprocess.run(
            [*command, "gs://bucket/run"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "note: the run in gs://bucket/run is continued" in done.stderr
        assert results(lambda name: storage.objects[f"run/{name}"].content) == whole[0]


def test_of_two_processes_in_one_folder_one_trains_and_the_other_is_refused(
    command, whole, tmp_path
):
    both = [start(command, tmp_path / "run") for _ in range(2)]
    said = [process.communicate()[1].splitlines() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2]
    assert said[codes.index(2)][-1] == (
        f"error: another process trains in {tmp_path / 'run'}: wait for it or choose another "
        "--workdir"
    )
    assert finish(command, tmp_path / "run") == whole[0]


def test_an_interrupt_says_how_to_continue(command, whole, tmp_path):
    process = start(command, tmp_path / "run")
    while not (tmp_path / "run" / "checkpoints").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    lines = process.communicate()[1].splitlines()
    assert process.returncode == 130
    assert lines[-1] == f"error: interrupted; to continue: tljax train --resume {tmp_path / 'run'}"
    assert finish(command, tmp_path / "run") == whole[0]


def test_a_second_interrupt_ends_at_once(command, whole, tmp_path):
    process = start(command, tmp_path / "run")
    time.sleep(0.6 * whole[1])
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    began = time.monotonic()
    lines = process.communicate()[1].splitlines()
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    assert re.match(r"error: interrupted($|; to continue| again$)", lines[-1])
    assert not any("Traceback" in line for line in lines)
    assert finish(command, tmp_path / "run") == whole[0]


ON_A_DISK = """
mount -t tmpfs -o size=$1k tmpfs "$2"; shift
"${@:2}" "$1/run" >/dev/null 2>"$1.said"; code=$?
mount -o remount,size=100m "$1"
"${@:2}" "$1/run" >/dev/null && cp -r "$1/run" "$1.run"
exit $code
"""


@pytest.mark.parametrize("size", [4, 16, 64, 512, 3000])
def test_a_full_disk_is_one_line_and_the_same_command_continues(command, whole, tmp_path, size):
    """Sizes in KiB are too small for the options, the images, checkpoints or the network."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--mount"]
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if not shutil.which("unshare") or subprocess.run([*alone, *mount], check=False).returncode:
        pytest.skip("needs the right to mount a disk in memory")
    done = subprocess.run(
        [*alone, "bash", "-c", ON_A_DISK, "-", str(size), str(disk), *command],
        check=False,
        env={**os.environ, "TLJAX_CACHE": str(tmp_path / "cache")},
    )
    lines = (tmp_path / "disk.said").read_text().splitlines()
    assert done.returncode == 2, lines
    assert [line for line in lines if "rror" in line or "Trace" in line] == lines[-1:]
    assert "No space left on device" in lines[-1]
    found = results(lambda name: (tmp_path / "disk.run" / name).read_bytes())
    assert found == whole[0]
