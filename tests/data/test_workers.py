"""Workers start once, are told of faults in one line, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tljax.data import workers
from tljax.data.examples import Source, select
from tljax.data.folders import open_folder
from tljax.data.loader import load_batches
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess

TINY = Preprocess(size=6, resize=8)


@pytest.fixture(scope="module", name="photographs")
def _photographs(tmp_path_factory) -> Source:
    """Create 50 JPEGs of different shapes, one of which is damaged."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(50):
        shape = rng.integers(8, 40, 2)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{i:02d}.jpg")
    (folder / "13.jpg").write_bytes(b"\xff\xd8\xff damaged")
    return open_folder(folder)


def batches_of(source: Source, workers: int, shard: tuple[int, int] = (0, 1)) -> list[list]:
    loaded = load_batches(source, TINY, batch_size=20, seed=1, workers=workers, shard=shard)
    return [[field.tobytes() for field in batch[:4]] for batch in loaded]


def shared_memory() -> set[Path]:
    folder = Path("/dev/shm")  # where Linux has it
    return set(folder.iterdir()) if folder.is_dir() else set()


def worker_ids() -> set[int]:
    children = psutil.Process().children()
    return {child.pid for child in children if "spawn_main" in "".join(child.cmdline())}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(photographs, count):
    for shard in ((0, 1), (0, 2), (1, 2)):
        expected = batches_of(photographs, 0, shard)
        assert batches_of(photographs, count, shard) == expected


def test_workers_start_once_for_all_passes_and_sources(photographs):
    batches_of(photographs, 2)
    ids = worker_ids()
    for part in (photographs, select(photographs, np.arange(30)), select(photographs, [3, 1])):
        batches_of(part, 2)
    assert worker_ids() == ids


def test_selections_of_the_same_examples_are_shared_once(photographs):
    batches_of(photographs, 2)
    before = shared_memory()
    for k in range(3):
        batches_of(select(photographs, np.arange(k, 40)), 2)
    assert shared_memory() <= before


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_line_and_the_next_pass_starts_new_ones(photographs):
    expected = batches_of(photographs, 0)
    before = worker_ids()
    batches_of(photographs, 3)
    os.kill(min(worker_ids() - before), signal.SIGKILL)
    time.sleep(2)  # until the pool has noticed
    with pytest.raises(RequestError, match="was killed, perhaps because memory was short: choose"):
        batches_of(photographs, 3)
    assert batches_of(photographs, 3) == expected


def test_memory_of_examples_that_are_not_used_any_more_is_freed():
    """Data sets follow each other, of which workers know four."""

    def pass_over_another() -> tuple[set[Path], int]:
        batches_of(arrays(0), 2)
        return shared_memory(), psutil.Process().num_fds()

    for _ in range(4):
        pass_over_another()
    before, files = pass_over_another()
    after, files_after = pass_over_another()
    assert len(after) == len(before)
    assert files_after <= files


def test_more_data_sets_than_workers_know_are_read_side_by_side():
    sources = [arrays(k) for k in range(6)]
    loaded = [load_batches(source, TINY, batch_size=4, workers=2) for source in sources]
    for batches in zip(*loaded, strict=True):
        assert [batch.inputs[0, 0, 0, 0] for batch in batches] == [*range(6)]


def arrays(value: int) -> Source:
    return Source(np.full((40, 8, 8, 3), value, np.uint8), np.zeros(40, int), ("a",), ["x"] * 40)


class Slow:
    """Examples that take a tenth of a second each."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> np.ndarray:
        time.sleep(0.1)
        return np.full((8, 8, 3), index % 256, np.uint8)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.slow
def test_a_batch_that_no_one_needs_any_more_ends_after_the_next_image(count):
    source = Source(Slow(), np.zeros(400, np.int32), ("a",), ["x"] * 400)
    decode, stopped = workers.decoder(count)
    out = np.zeros((100, *TINY.shape), np.uint8)
    decode(source.examples, TINY, np.full(100, -1), out)  # starts what it needs
    threading.Timer(0.3, stopped.set).start()
    began = time.monotonic()
    decode(source.examples, TINY, np.arange(100), out)
    assert time.monotonic() - began < 2
    assert not out[-1].any()


@dataclass(frozen=True, eq=False)
class Local:
    """Examples that cannot be pickled."""

    function: object

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full((8, 8, 3), index, np.uint8)


def test_examples_that_cannot_be_handed_over_are_refused():
    source = Source(Local(lambda: None), np.zeros(2, np.int32), ("a",), ("a", "b"))
    with pytest.raises(RequestError, match="Local cannot be handed to other processes, choose --w"):
        batches_of(source, 2)
    assert len(batches_of(source, 0)) == 1


def test_too_little_shared_memory_is_said_before_it_is_written_to(monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage)
    images = np.zeros((4, 32, 32, 3), np.uint8)
    source = Source(images, np.zeros(4, np.int32), ("a",), "abcd")
    with pytest.raises(RequestError, match=r"shared memory, /dev/shm has 0: choose"):
        batches_of(source, 2)


SCRIPT = """
    import sys
    import numpy as np
    from tljax.data.examples import Source
    from tljax.data.loader import load_batches
    from tljax.runtime.preprocess import Preprocess

    if __name__ == "__main__":
        n = 4000
        source = Source(np.zeros((n, 8, 8, 3), np.uint8), np.zeros(n, np.int32), "a", ["x"] * n)
        for batch in load_batches(source, Preprocess(4, 4), batch_size=8, workers=2):
            print("batch", flush=True)
            if sys.argv[1:] == ["first"]:
                break
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_program(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "batch\n"
        children = psutil.Process(program.pid).children()
        program.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.slow
def test_a_program_that_stops_early_prints_nothing_and_leaves_no_memory(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    before = shared_memory()
    done = subprocess.run(
        [sys.executable, path, "first"], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("batch\n", "")
    assert shared_memory() <= before


@pytest.mark.slow
def test_a_script_without_the_guard_is_told_of_it(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT.replace('__name__ == "__main__"', "True")))
    done = subprocess.run([sys.executable, path], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "must be a file with the guard if __name__" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
@pytest.mark.parametrize("wait", ["start", "batch"])
def test_workers_print_nothing_on_ctrl_c(tmp_path, wait):
    """Whether they decode or are still being started."""
    path = tmp_path / "script.py"
    start = 'print("start", flush=True)\n        for batch'
    path.write_text(textwrap.dedent(SCRIPT.replace("for batch", start)))
    with subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        while program.stdout.readline() != f"{wait}\n":
            pass
        time.sleep(0.5)
        os.killpg(program.pid, signal.SIGINT)
        errors = program.communicate(timeout=60)[1]
    assert errors.count("Traceback") == 1, errors  # of the program itself


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of signals is unknown")
def test_workers_go_on_after_a_sigterm_that_is_meant_for_the_program(photographs):
    """Schedulers send it to all processes of a job, and the program has to save its state."""
    expected = batches_of(photographs, 0)
    batches_of(photographs, 2)
    ids = worker_ids()
    subprocess.run(["kill", "-TERM", *map(str, ids)], check=True)
    assert batches_of(photographs, 2) == expected
    assert worker_ids() == ids
