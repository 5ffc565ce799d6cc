"""Atomic writes with concurrent writers and full disks, the cache folder, and digests."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tljax.runtime.errors import RequestError, WriteError
from tljax.runtime.files import atomic_write, cache_dir, sha256


def write(path, text, **options):
    with atomic_write(path, **options) as temporary:
        temporary.write_text(text)


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path, texts = tmp_path / "file", {"a" * 100_000, "b" * 100_000}
    write(path, "a" * 100_000)
    seen, done = [], threading.Event()

    def writing():
        for text in (*texts, *texts) * 10:
            write(path, text)
        done.set()

    writers = [threading.Thread(target=writing) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not done.is_set():
        seen.append(path.read_text())
    for writer in writers:
        writer.join()
    assert set(seen) <= texts
    assert list(tmp_path.iterdir()) == [path]


def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_exactly_one_of_several_exclusive_writers_succeeds(tmp_path, monkeypatch, links):
    """Also on file systems without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path, outcomes = tmp_path / "file", []
    barrier = threading.Barrier(8)

    def writing(number):
        barrier.wait()
        try:
            write(path, str(number), exclusive=True)
            outcomes.append(number)
        except FileExistsError:
            outcomes.append(None)

    writers = [threading.Thread(target=writing, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert outcomes.count(None) == 7
    assert path.read_text() in map(str, outcomes)
    assert list(tmp_path.iterdir()) == [path]


def fail(path, error, **options):
    with atomic_write(path, **options) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("exclusive", [True, False])
def test_an_error_in_the_block_leaves_no_file(tmp_path, exclusive):
    for error in (KeyboardInterrupt(), ValueError("x"), OSError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(error)):
            fail(tmp_path / "file", error, exclusive=exclusive)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_error_is_reported_and_the_old_file_remains(tmp_path, number):
    path = tmp_path / "file"
    write(path, "old")
    reason = os.strerror(number)
    with pytest.raises(WriteError, match=rf"^{path}: cannot be written \({reason}\)$"):
        fail(path, OSError(number, reason))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exclusive", [True, False])
def test_an_unwritable_path_is_reported_in_one_line(tmp_path, exclusive):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "in it").mkdir(parents=True)
    places = [tmp_path / "file" / "new", Path("/proc/new/file"), tmp_path / ("x" * 300)]
    for path in (*places, *(() if exclusive else [tmp_path / "folder"])):
        with pytest.raises(RequestError, match=r"^[^\n]*: cannot be written \([^\n]*\)$"):
            write(path, "new", exclusive=exclusive)


def test_a_folder_removed_by_another_process_is_created_again(tmp_path, monkeypatch):
    folder, mkdir = tmp_path / "folder", Path.mkdir
    removed = []

    def mkdir_and_remove(path, *args, **options):
        mkdir(path, *args, **options)
        if len(removed) < 3:
            path.rmdir()
            removed.append(path)

    monkeypatch.setattr(Path, "mkdir", mkdir_and_remove)
    write(folder / "file", "text")
    assert removed == 3 * [folder]
    assert (folder / "file").read_text() == "text"


def test_temporary_files_of_killed_processes_are_removed_after_a_day(tmp_path):
    names = ".file.1.part", ".file.2.part", ".other.1.part"
    for name, age in zip(names, (90_000, 0, 90_000), strict=True):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write(tmp_path / "file", "text")
    remaining = sorted(path.name for path in tmp_path.iterdir())
    assert remaining == [".file.2.part", ".other.1.part", "file"]


def test_without_a_home_folder_the_cache_folder_must_be_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("TLJAX_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    monkeypatch.delenv("TLJAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(RequestError, match="no home folder: set TLJAX_CACHE"):
        cache_dir()


FULL = """
import resource, signal, sys
from pathlib import Path
from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for exclusive in (True, False):
    try:
        with atomic_write(Path(sys.argv[1]), exclusive=exclusive) as temporary:
            temporary.write_text("x" * 5000)
    except RequestError as error:
        print(error)
"""


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    """A limit on the size of files simulates the full disk."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == 2 * f"{tmp_path}/file: cannot be written (File too large)\n"
    assert list(tmp_path.iterdir()) == []


def test_the_target_of_a_symbolic_link_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "file.txt")
    with atomic_write(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "there" / "file.txt").read_text() == "new"
    (tmp_path / "folder").symlink_to(tmp_path / "there")
    with (
        pytest.raises(RequestError, match="cannot be written"),
        atomic_write(tmp_path / "folder") as temporary,
    ):
        temporary.write_text("new")
    assert (tmp_path / "folder").is_dir()


def test_sha256_of_a_file_equals_that_of_its_bytes(tmp_path):
    for data in (b"", b"abc", b"weights" * 1_000_000):
        (tmp_path / "file").write_bytes(data)
        assert sha256(tmp_path / "file") == sha256(data) == hashlib.sha256(data).hexdigest()


def test_a_device_or_pipe_is_written_and_not_replaced(tmp_path: Path):
    """`--out /dev/stdout` writes to stdout, and root does not replace /dev/null by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(pipe) as temporary:
        temporary.write_bytes(b"text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [*tmp_path.iterdir()] == [pipe]
    code = "from pathlib import Path; from tljax.runtime.files import atomic_write\n"
    code += "with atomic_write(Path('/dev/stdout')) as file: file.write_text('text')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"text"
