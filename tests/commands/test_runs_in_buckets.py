"""Runs and weights in buckets: files against a local folder, commands against an emulator."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from fake_bucket import needs_gcsfs, serve_bucket
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from networks import random_pretrained
from test_extension import options
from test_scripts import call_script

from tljax.pretrained import load_pretrained, save
from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write, in_bucket, locked, open_path
from tljax.runtime.trees import tree_digest
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
    with pytest.raises(RequestError, match=r"^gs:// names no bucket: write gs://BUCKET/RUN"):
        open_path(Path("gs://"))
    assert open_path("gs") == Path("gs")
    monkeypatch.setitem(known_implementations, "gcs", {"class": "no.such", "err": "Install gcsfs"})
    line = r'^gs://b/run needs gcsfs: pip install "tljax\[gcs\]"$'
    with pytest.raises(RequestError, match=line):
        open_path(Path("gs://b/run"))


def test_the_lines_of_steps_are_uploaded_with_that_of_their_epoch_or_at_the_end(bucket):
    metrics = MetricsFile(open_path("gs://b/run"))
    for step in (1, 2):
        metrics.on_step(step, {"loss": 0.5})
    assert Bucket.uploads == []
    metrics.on_epoch([{"epoch": 0}])
    metrics.on_step(3, {"loss": 0.5})
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    expected = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"epoch": 0}]
    assert [json.loads(line) for line in lines] == expected
    metrics.close()
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*expected, {"step": 3, "loss": 0.5}]


# gcsfs gives aiohttp whole files.
LARGE = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


@pytest.fixture(name="storage", scope="module")
def _storage():
    with serve_bucket() as storage:
        yield storage


@pytest.mark.slow
@needs_gcsfs
@LARGE
def test_a_run_in_a_bucket_has_the_bytes_of_a_local_one_and_can_be_used_like_it(storage, tmp_path):
    train = options(tmp_path)
    for workdir in (tmp_path / "run", "gs://bucket/run"):
        done = call_script(tmp_path, *train, "--workdir", workdir)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["workdir"] == "gs://bucket/run"
    local = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*.*")}
    for name in map(str, local):
        if not name.startswith(("checkpoints", "config", "report", "README")):
            content = storage.objects[f"run/{name}"].content
            assert content == (tmp_path / "run" / name).read_bytes(), name
        elif not name.startswith("checkpoints"):
            assert len(storage.objects[f"run/{name}"].content) > 100
    for command in ("evaluate", "attack --steps 2"):
        name, *rest = command.split()
        said = [
            call_script(tmp_path, name, *rest, *where)
            for where in (["--workdir", tmp_path / "run"], ["--workdir", "gs://bucket/run"])
        ]
        assert [done.returncode for done in said] == [0, 0], said[1].stderr
    assert "run/eval/report.html" in storage.objects


@pytest.mark.slow
@needs_gcsfs
@LARGE
def test_weights_in_a_bucket_are_downloaded_once_for_each_version(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    first, second = (random_pretrained("mobilenetv2_050", n) for n in (5, 7))
    for place in ("net.safetensors", "exported/model.safetensors", "done/best/model.safetensors"):
        url = "gs://bucket/" + place.removesuffix("/model.safetensors").removesuffix("/best")
        for network in (first, second):
            save(open_path(f"gs://bucket/{place}"), network)
            for _ in range(2):
                loaded = load_pretrained(url)
                assert tree_digest(loaded.variables) == tree_digest(network.variables)
        assert storage.downloads.count(place) == 2
    for url in ("gs://bucket/missing.pth", "gs://nowhere/net.safetensors"):
        with pytest.raises(RequestError, match=rf"^{url} does not exist$"):
            load_pretrained(url)
