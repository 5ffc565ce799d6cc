"""A run directory in a bucket, for which a local folder stands, without renames and appends."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from test_extension import options
from test_scripts import call_script

from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write, in_bucket, locked, open_path
from tljax.train import checkpoint
from tljax.train.run_directory import MetricsFile


class Bucket(DirFileSystem):
    """File system of gs:// that knows only what buckets can do."""

    protocol = ("gcs", "gs")
    root = ""
    uploads: list[str] = []  # noqa: RUF012 - of the class

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("gs://").rstrip("/")

    def _join(self, path):
        return super()._join(self._strip_protocol(path))

    def open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb", "r", "w")
        if "w" in mode:
            self.uploads.append(self._strip_protocol(path))
        return super().open(path, mode, **options)

    def rename(self, *_, **__):
        raise NotImplementedError

    mv = rename


@pytest.fixture(name="bucket")
def _bucket(tmp_path, monkeypatch):
    """Return the folder that stands for gs://b."""
    monkeypatch.setattr(Bucket, "root", str(tmp_path / "buckets"))
    monkeypatch.setattr(Bucket, "uploads", [])
    monkeypatch.setattr(
        "etils.epath.backend._FileSystemSpecBackend._get_filesystem", lambda *_: Bucket()
    )
    Bucket.clear_instance_cache()
    return tmp_path / "buckets" / "b"


def test_a_file_in_a_bucket_is_uploaded_once_when_it_is_complete(bucket):
    path = open_path(Path("gs://b/run")) / "x" / "a.txt"
    assert in_bucket(path)
    assert str(path) == "gs://b/run/x/a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with suppress(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(FileExistsError), atomic_write(path, exclusive=True) as temporary:
        temporary.write_text("second")
    assert (bucket / "run" / "x" / "a.txt").read_text() == "first"
    assert Bucket.uploads == ["b/run/x/a.txt"]
    with locked(path, "never"), locked(path, "never"):
        pass  # a bucket has no locks


def test_a_bucket_that_cannot_be_opened_is_one_line(monkeypatch):
    with pytest.raises(RequestError, match="ftp://: choose a local folder, or one in a bucket"):
        open_path(Path("ftp://b/run"))
    monkeypatch.setitem(known_implementations, "gcs", {"class": "no.such", "err": "Install gcsfs"})
    with pytest.raises(RequestError, match=r"^gs://b/run cannot be opened: Install gcsfs$"):
        open_path(Path("gs://b/run"))


def test_the_lines_of_steps_are_uploaded_with_that_of_their_epoch(bucket):
    metrics = MetricsFile(open_path("gs://b/run"))
    for step in (1, 2):
        metrics.on_step(step, {"loss": 0.5})
    assert Bucket.uploads == []
    metrics.on_epoch([{"epoch": 0}])
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"epoch": 0},
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_in_a_bucket_has_the_bytes_of_a_local_one(bucket, tmp_path, monkeypatch):
    """Its checkpoints are in the folder: TensorStore has a client of its own for gs://."""

    class Local(checkpoint.Checkpoints):
        def __init__(self, folder, identity):
            place = Path(Bucket.root, Bucket._strip_protocol(folder))
            super().__init__(place if in_bucket(folder) else folder, identity)

    monkeypatch.setattr("tljax.train.checkpoint.Checkpoints", Local)
    train = options(tmp_path)
    for workdir in (tmp_path / "run", "gs://b/run"):
        done = call_script(tmp_path, *train, "--workdir", workdir)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["workdir"] == "gs://b/run"
    names = ("best/model.safetensors", "metrics.jsonl", "split.csv", "classes.json", "skipped.csv")

    def contents(folder):
        return {name: (folder / name).read_bytes() for name in names}

    assert contents(bucket / "run") == contents(tmp_path / "run")
    for name in ("config.json", "report.html", "README.md"):
        assert (bucket / "run" / name).stat().st_size > 100
    # The same command goes on from the checkpoint of the first epoch.
    numbers = sorted(int(path.name) for path in (bucket / "run" / "checkpoints").iterdir())
    shutil.rmtree(bucket / "run" / "checkpoints" / str(numbers[-1]))
    shutil.rmtree(bucket / "run" / "best")
    done = call_script(tmp_path, *train, "--workdir", "gs://b/run")
    assert done.returncode == 0, done.stderr
    assert "note: the run in gs://b/run is continued" in done.stderr
    assert contents(bucket / "run") == contents(tmp_path / "run")
