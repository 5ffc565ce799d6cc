"""Checkpoints: intact ones are restored, damaged ones are recognized."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from together import start_together

from tljax.runtime.errors import RequestError
from tljax.runtime.trees import array_bytes, tree_digest
from tljax.train.checkpoint import Checkpoints

TESTS = Path(__file__).parents[1]


def state(number):
    rng = np.random.default_rng(number)
    values = rng.normal(size=(4, 5)).astype(np.float32)
    return {
        "params": {"head": values, "half": values.astype(ml_dtypes.bfloat16)},
        "count": np.int32(number),
    }


def position(number):
    return {"epoch": number, "batch": 3, "history": [{"phase": "train", "loss": 0.1 + number}]}


def saved(folder, numbers=(1, 2, 3), identity="mine"):
    checkpoints = Checkpoints(folder, identity)
    for number in numbers:
        checkpoints.save(number, position(number), state(number))
    checkpoints.close()


def assert_is(actual, number):
    assert actual.position == position(number)
    filled = actual.fill(state(0))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b, strict=True), filled, state(number)
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    saved(folder)
    return folder


def test_the_last_checkpoint_is_restored(good, tmp_path):
    assert sorted(path.name for path in good.iterdir()) == ["2", "3"]
    actual = Checkpoints(good, "mine").restore()
    assert actual.notes == ()
    assert_is(actual, 3)
    assert Checkpoints(tmp_path / "new", "mine").restore() is None


def test_saving_copies_the_arrays(tmp_path):
    checkpoints = Checkpoints(tmp_path, "mine")
    given = state(1)
    checkpoints.save(1, position(1), given)
    given["params"]["head"][:] = 0
    checkpoints.close()
    assert_is(Checkpoints(tmp_path, "mine").restore(), 1)


def test_any_orbax_reads_the_arrays_by_their_names(good):
    expected = state(3)
    for reader in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        with reader:
            actual = reader.restore(good.absolute() / "3")
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(partial(np.testing.assert_array_equal, strict=True), actual, expected)


def test_saving_does_not_wait_for_the_checksums(tmp_path, monkeypatch):
    """The thread that writes computes them, of the arrays as they were."""
    saved, threads = threading.Event(), set()

    def late(array):
        saved.wait(60)
        threads.add(threading.current_thread())
        return array_bytes(array)

    monkeypatch.setattr("tljax.train.checkpoint_arrays.array_bytes", late)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    given = jax.numpy.arange(3.0)
    checkpoints = Checkpoints(tmp_path, "mine")
    checkpoints.save(1, position(1), {"x": given})
    step(given)
    saved.set()
    checkpoints.close()
    assert threads
    assert threading.main_thread() not in threads
    monkeypatch.undo()
    actual = Checkpoints(tmp_path, "mine").restore().fill({"x": np.zeros(3, np.float32)})
    assert actual["x"].tolist() == [0, 1, 2]


def test_checkpoints_of_another_run_or_network_are_refused(good):
    with pytest.raises(
        RequestError, match=r"belongs to a run with other.*choose another --workdir"
    ):
        Checkpoints(good, "yours").restore()
    actual = Checkpoints(good, "mine").restore()
    for wrong in (
        {**state(0), "count": np.int64(0)},
        {**state(0), "count": np.zeros(2, np.int32)},
        {"params": state(0)["params"]},
    ):
        with pytest.raises(RequestError, match="saved with another network"):
            actual.fill(wrong)


def damages(path):
    """Return functions that damage a file, each in another way."""
    content = path.read_bytes()
    rng = np.random.default_rng(len(content))

    def flip(at):
        bit = 1 << int(rng.integers(8))
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])

    yield path.unlink
    if content:
        yield lambda: path.write_bytes(content[:-1])
        yield lambda: path.write_bytes(content[: len(content) // 2])
        for at in {0, len(content) - 1, *rng.integers(len(content), size=4).tolist()}:
            yield lambda at=at: flip(at)


# Orbax leaves futures of the read that failed behind a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_never_restored_as_another_state(good, tmp_path):
    """Whichever file is damaged, the last state or the one before is restored."""
    files = [path.relative_to(good) for path in sorted((good / "3").rglob("*")) if path.is_file()]
    passed_over = 0
    for file in files:
        for number in range(len(list(damages(good / file)))):
            folder = tmp_path / "damaged"
            shutil.copytree(good, folder)
            list(damages(folder / file))[number]()
            actual = Checkpoints(folder, "mine").restore()
            if actual.position == position(3):
                assert actual.notes == ()
                assert_is(actual, 3)
            else:
                assert_is(actual, 2)
                passed_over += 1
            shutil.rmtree(folder)
    assert len(files) > 5
    assert passed_over > 20


def damage(folder):
    """Flip a byte in the middle of the largest file."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_changed_position_is_recognized(good, tmp_path):
    """A changed digit leaves the JSON file valid."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    for number, text in ((3, '"batch": 3'), (2, '"mine"')):
        path = folder / str(number) / "tljax.0.json"
        content = path.read_text()
        assert text in content
        path.write_text(content.replace(text, text.replace("3", "2").replace("mine", "nine")))
    with pytest.raises(
        RequestError, match=r"no checkpoint is intact: checkpoint 3 .*; .* 2 is dam"
    ):
        Checkpoints(folder, "mine").restore()


def test_the_run_continues_after_a_damaged_checkpoint(good, tmp_path):
    """The damaged one is kept and marked, and no intact one is deleted for it."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    damage(folder / "3")
    before = contents(folder / "3")
    checkpoints = Checkpoints(folder, "mine")
    actual = checkpoints.restore()
    assert_is(actual, 2)
    assert actual.notes == ("checkpoint 3 is damaged",)
    assert contents(folder / "3") == before
    assert (folder / "3.damaged").is_file()
    checkpoints.save(3, position(7), state(7))
    checkpoints.close()
    assert retained(folder) == ["2", "3", "4"]
    checkpoints = Checkpoints(folder, "mine")
    actual = checkpoints.restore()
    assert actual.position == position(7)
    assert actual.notes == ()
    for number in (3, 4, 9):
        checkpoints.save(number, position(number), state(number))
    checkpoints.close()
    assert retained(folder) == ["3", "6", "9"]
    assert contents(folder / "3") == before
    assert_is(Checkpoints(folder, "mine").restore(), 9)


def retained(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damage_is_skipped_even_if_it_cannot_be_marked(good, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    damage(folder / "3")
    checkpoints = Checkpoints(folder, "mine")
    (folder / "3.damaged").mkdir()
    assert_is(checkpoints.restore(), 2)
    checkpoints.save(3, position(7), state(7))
    checkpoints.close()
    assert retained(folder) == ["2", "3", "3.damaged", "4"]


def test_no_checkpoint_is_deleted_when_all_are_damaged(good, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    for number in ("2", "3"):
        damage(folder / number)
    for _ in range(2):  # the second time, they are recognized by their markers
        with pytest.raises(
            RequestError, match=r"no checkpoint is intact: .* 3 .*; .* 2 is damaged"
        ):
            Checkpoints(folder, "mine").restore()
    assert retained(folder) == ["2", "3"]


TENSORSTORE = (
    '{}: Error opening "zarr" driver: Error reading local file "d/1f48": Failed to read 405 bytes '
    "from file at offset 0: {} [os_error_code='{}'] [tensorstore_spec='{{\"driver\":\"zarr\"}}']"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (OSError(errno.ENFILE, "Too many open files"), "Too many open files"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "Connection timed out"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (ValueError(TENSORSTORE.format("UNKNOWN", "Input/output error", 5)), "Input/output error"),
        (ValueError(TENSORSTORE.format("ABORTED", "Stale file handle", 116)), "Stale file handle"),
        (ValueError(TENSORSTORE.format("FAILED_PRECONDITION", "Broken", 107)), "Broken"),
        (ValueError("DEADLINE_EXCEEDED: reading: Timeout"), "Timeout"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_failure_of_the_disk_does_not_count_as_damage(good, tmp_path, monkeypatch, error, reason):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    before = contents(folder)

    def failing(*_args, **_how):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", failing)
        with pytest.raises(RequestError, match=rf"checkpoint 3 .*\({reason}\).* try again$"):
            Checkpoints(folder, "mine").restore()
    assert contents(folder) == before
    assert_is(Checkpoints(folder, "mine").restore(), 3)


def test_a_checkpoint_deleted_by_another_process_does_not_count_as_damaged(
    good, tmp_path, monkeypatch
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    restore = ocp.PyTreeCheckpointHandler.restore

    def late(*args, **options):
        shutil.rmtree(folder / "3")
        return restore(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", late)
        with pytest.raises(RequestError, match="try again"):
            Checkpoints(folder, "mine").restore()
    assert retained(folder) == ["2"]
    assert not list(folder.glob("*.damaged"))
    assert_is(Checkpoints(folder, "mine").restore(), 2)


TWO_PROCESSES = """
import sys
from pathlib import Path
import numpy as np
import orbax.checkpoint as ocp
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import gather_json, is_main_process, join
from tljax.train.checkpoint import Checkpoints

join()
folder = Path(sys.argv[1])
opened = Checkpoints(folder, "mine")
for number in (1, 2):
    opened.save(number, {"epoch": number}, dict.fromkeys("xy", np.full(3, number, np.float32)))
opened.close()

def restored():
    opened = Checkpoints(folder, "mine")
    try:
        found = opened.restore()
        filled = found.fill(dict.fromkeys("xy", np.zeros(3, np.float32)))
        print(found.position["epoch"], filled["x"].tolist(), *found.notes, flush=True)
    except RequestError as error:
        print(error, flush=True)
    opened.close()

restored()
restore = ocp.PyTreeCheckpointHandler.restore
for writer, error in ((True, OSError(5, "Ouch")), (False, OSError(5, "Oh"))):
    def failing(*args, **how):
        if is_main_process() == writer:
            raise error
        return restore(*args, **how)

    ocp.PyTreeCheckpointHandler.restore = failing
    restored()
ocp.PyTreeCheckpointHandler.restore = restore
gather_json(None)
if is_main_process():
    (folder / "2" / "tljax.1.json").write_text("{")
gather_json(None)
restored()
"""


def run_together(program, folder, processes, devices=1):
    """Return the lines that each process prints."""
    command = [sys.executable, "-c", program, str(folder)]
    started = start_together(command, processes, devices)
    printed = [process.communicate(timeout=200)[0].splitlines() for process in started]
    return [[line for line in lines if "Gloo" not in line] for lines in printed]


@pytest.mark.slow
def test_damage_that_one_process_sees_is_damage_for_all(tmp_path):
    first, second = run_together(TWO_PROCESSES, tmp_path / "checkpoints", 2)
    assert first == second
    assert len(first) == 4
    assert first[0] == "2 [2.0, 2.0, 2.0]"
    for line, reason in zip(first[1:3], ("Ouch", "Oh"), strict=True):
        assert f"checkpoint 2 cannot be read ({reason})" in line
    assert first[3] == "1 [1.0, 1.0, 1.0] checkpoint 2 is damaged"
    assert retained(tmp_path / "checkpoints") == ["1", "2"]


SHARDED = """
import sys
from contextlib import closing
import jax
import numpy as np
from tljax.runtime.files import open_path
from tljax.runtime.parallel import data_mesh, join, shard_parameters, to_host
from tljax.train.checkpoint import Checkpoints

join()
x = np.random.default_rng(0).random((256, 64), np.float32)
whole = {**shard_parameters({"x": x, "b": x[0, :7]}, data_mesh()), "host": x}
with closing(Checkpoints(open_path(sys.argv[1]), "mine")) as checkpoints:
    number = 1
    if found := checkpoints.restore():
        number = found.position["number"] + 1
        actual = found.fill(whole)
        for name, array in to_host(actual).items():
            np.testing.assert_array_equal(array, to_host(whole)[name])
        assert actual["x"].sharding == whole["x"].sharding
        assert actual["b"].sharding == whole["b"].sharding
    checkpoints.save(number, {"number": number}, whole)
local = whole["x"].addressable_shards
print(number, len(local), *local[0].data.shape)
"""


@pytest.mark.slow
# Orbax leaves futures of the read that failed behind a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_of_some_processes_are_restored_by_others_or_recognized_as_damaged(tmp_path):
    folder = tmp_path / "checkpoints"
    assert run_together(SHARDED, folder, 2, 2) == [["1 2 64 64"]] * 2
    assert run_together(SHARDED, folder, 4) == [["2 1 64 64"]] * 4
    assert run_together(SHARDED, folder, 1) == [["3 1 256 64"]]
    assert run_together(SHARDED, folder, 2) == [["4 1 128 64"]] * 2
    whole = np.random.default_rng(0).random((256, 64), np.float32)
    like = {"x": whole, "b": whole[0, :7], "host": whole}
    files = [path for path in sorted((folder / "4").rglob("*")) if path.stat().st_size]
    files = [path for path in files if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files])
    rng, damaged = np.random.default_rng(1), 0
    for path in [*files, *rng.choice(files, 100, p=sizes / sizes.sum())]:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        found = Checkpoints(folder, "mine").restore()
        damaged += found.position["number"] == 3
        np.testing.assert_array_equal(found.fill(like)["x"], whole)
        path.write_bytes(content)
        (folder / "4.damaged").unlink(missing_ok=True)
    assert damaged > 80


def test_an_unfinished_checkpoint_is_not_restored(good, tmp_path):
    """It has a temporary name until it is complete."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    shutil.copytree(good / "3", folder / "4.orbax-checkpoint-tmp")
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    assert_is(Checkpoints(folder, "mine").restore(), 3)


@pytest.mark.parametrize("folder", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_reported_in_one_line(folder):
    with pytest.raises(RequestError, match=rf"^{folder}/new: cannot be written \([^\n]*\)$"):
        Checkpoints(Path(folder) / "new", "mine")


SAVES = """
import resource, signal, sys
from contextlib import closing
from pathlib import Path
import numpy as np
from tljax.runtime.errors import RequestError
from tljax.train.checkpoint import Checkpoints

noise = np.random.default_rng(0).random(30_000)

def save(folder, numbers):
    try:
        with closing(Checkpoints(folder, "mine")) as checkpoints:
            for number in numbers:
                checkpoints.save(number, {"epoch": number}, {"x": noise + number})
    except RequestError as error:
        print(error)

def restored(folder):
    with closing(Checkpoints(folder, "mine")) as checkpoints:
        found = checkpoints.restore()
    if found is None:
        return 0
    state = found.fill({"x": noise})
    np.testing.assert_array_equal(state["x"], noise + found.position["epoch"])
    assert found.notes == ()
    return found.position["epoch"]
"""

FULL_DISK = """
folder = Path(sys.argv[1])
save(folder, [1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save(folder, [2])
print(restored(folder))
"""


def run(code, *arguments, before=()):
    done = subprocess.run(
        [*before, sys.executable, "-c", SAVES + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_full_disk_is_reported_in_one_line_and_the_checkpoint_before_is_kept(tmp_path):
    """A limit on the size of files simulates the disk."""
    folder = tmp_path / "checkpoints"
    line, actual = run(FULL_DISK, folder)
    assert line == (
        f"{folder}: a checkpoint cannot be written (File too large); earlier ones are kept: "
        "free disk space and continue with --resume"
    )
    assert actual == "1"


SMALL_DISKS = """
import subprocess
disk = sys.argv[1]
for size in map(int, sys.argv[2:]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    save(Path(disk, "checkpoints"), range(1, 5))
    print(size, restored(Path(disk, "checkpoints")), flush=True)
    subprocess.run(["umount", "--lazy", disk], check=True)
"""


@pytest.mark.slow
def test_an_intact_checkpoint_is_restored_wherever_the_disk_becomes_full(tmp_path):
    """On disks for 0 to 4 checkpoints of 250 KiB, each file is once the first not to fit."""
    unshare = ["unshare", "--mount"]
    probe = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, *probe], check=False, capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a disk in memory")
    sizes = [*range(40, 800, 40), *range(240, 272, 4), *range(480, 532, 4), 1200]
    lines = run(SMALL_DISKS, tmp_path, *sizes, before=unshare)
    restored, errors = {}, {}
    said = None
    for line in lines:
        if line.startswith(
            f"{tmp_path}/checkpoints: a checkpoint cannot be written (No space left"
        ):
            said = line
        else:
            size, actual = map(int, line.split())
            restored[size], errors[size], said = actual, said, None
    assert restored.keys() == set(sizes)
    assert {0, 1, 2, 4} <= set(restored.values())
    assert restored[40] == 0
    assert restored[1200] == 4
    assert errors[1200] is None
    # Cleaning up after the last one may fail, too.
    assert all(errors[size] for size in sizes if restored[size] < 4)


INTERRUPTS = """
import json, os, threading, time

def forked(function, *arguments):
    read, write = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            os.write(write, json.dumps(function(*arguments)).encode())
            code = 0
        finally:
            threading._shutdown()  # as at the end of every process
            os._exit(code)
    assert os.wait()[1] == 0
    return json.loads(os.read(read, 10_000))

def interrupted(folder, after):
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    save(folder, [1, 2])
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        save(folder, [3, 4])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return None
    return time.monotonic() - began

folder, count = Path(sys.argv[1]), int(sys.argv[2])
whole = forked(interrupted, folder / "whole", 60)
for number in range(count):
    forked(interrupted, folder / str(number), whole * (number + 0.5) / count)
    print(forked(restored, folder / str(number)), flush=True)
"""


@pytest.mark.slow
def test_an_interrupt_at_any_moment_leaves_the_last_intact_checkpoint(tmp_path):
    actual = list(map(int, run(INTERRUPTS, tmp_path, 12)))
    assert len(actual) == 12
    assert set(actual) <= {2, 3, 4}
    assert {2, 3} <= set(actual)


def test_the_digest_depends_on_names_and_bytes():
    tree = {"params": {"a": np.arange(3.0), "b": np.ones((2, 2), ml_dtypes.bfloat16)}}
    first = tree_digest(tree)
    assert tree_digest(jax.tree.map(np.copy, tree)) == first
    renamed = {"params": {"a": tree["params"]["a"], "c": tree["params"]["b"]}}
    moved = {"params": {**tree["params"], "a": np.nextafter(tree["params"]["a"], 9)}}
    assert len({first, tree_digest(renamed), tree_digest(moved)}) == 3


LONG_RUN = """
import sys
from pathlib import Path
import jax
import numpy as np
import tljax
from engine import config, everything, train

jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
folder = Path(sys.argv[1])

def log(history):
    print("entry", len(history), flush=True)

def objective(forward, batch, key):
    # A custom objective: cross-entropy, plus the difference of two draws of dropout.
    losses, metrics = tljax.cross_entropy()(forward, batch, key)
    views = [forward(batch.inputs).logits for _ in range(2)]
    return losses + jax.numpy.square(views[0] - views[1]).sum(1), metrics

RUNS = {
    "cached": (
        config(freeze_to="stem", epochs=40, batch_norm="batch", dropout=0.3, ema_decay=0.9),
        {},
    ),
    "mixed": (
        config(
            epochs=40,
            dropout=0.3,
            ema_decay=0.9,
            augment=True,
            augmentation=tljax.AugmentConfig(mixup=0.4),
        ),
        {"objective": objective},
    ),
}
what, hooks = RUNS[sys.argv[3]]
found = everything(train(what, folder=folder, on_epoch=log, **hooks), folder)
(folder / "result.txt").write_text(repr(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("run", ["cached", "mixed"])
def test_a_process_that_is_killed_twenty_times_gives_the_same_result(tmp_path, run):
    rng = np.random.default_rng(0)

    def start(folder):
        compiled = str(tmp_path / "compiled")
        arguments = [sys.executable, "-c", LONG_RUN, str(folder), compiled, run]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)

    began = None
    with start(tmp_path / "whole") as process:
        for _ in process.stdout:
            began = began or time.monotonic()
    seconds = time.monotonic() - began
    assert process.returncode == 0
    half_written, kills = 0, 0
    killed = tmp_path / "killed"

    def is_saving():
        return any(killed.glob("checkpoints/*tmp*"))

    while not (killed / "result.txt").exists():
        with start(killed) as process:
            if kills < 20:
                process.stdout.readline()  # it has begun
                time.sleep(rng.uniform(0, seconds / 30))
                while kills % 2 and not is_saving() and process.poll() is None:
                    pass  # every other one is killed while it writes
                process.kill()
                kills += 1
            process.stdout.read()
        if process.returncode == -signal.SIGKILL:
            half_written += is_saving()
        else:
            assert process.returncode == 0
    assert kills == 20
    assert half_written >= 3
    assert (killed / "result.txt").read_bytes() == (tmp_path / "whole/result.txt").read_bytes()
    assert (killed / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()
