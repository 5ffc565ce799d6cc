"""Settings that are made before JAX is imported."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

import tljax
from tljax.runtime import process
from tljax.runtime.errors import RequestError
from tljax.runtime.files import cache_dir

NAMES = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unset both variables and pretend that JAX is not imported."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    return tmp_path


def test_compiled_programs_are_cached_by_processor(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for machine in ("x86_64", "aarch64", "x86_64"):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setattr(process.platform, "machine", lambda machine=machine: machine)
        tljax.configure()
        found.append(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    assert found[0] == found[2] != found[1]
    assert {path.parent for path in found} == {fresh / "compiled"}


@pytest.mark.parametrize("chosen", ["", "/elsewhere"])
def test_existing_settings_are_respected(
    chosen: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=-all")
    tljax.configure()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == chosen
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type=-all"


def test_a_flag_unknown_to_jaxlib_is_not_set(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA aborts the process at an unknown flag."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=false")
    monkeypatch.setattr(process, "_FLAG", "xla_cpu_no_such_flag")
    tljax.configure()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_use_onednn=false"
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=false")
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    tljax.configure()
    assert os.environ["XLA_FLAGS"].startswith("--xla_cpu_use_onednn=false --xla_cpu_")


@pytest.mark.parametrize(("precision", "printed"), [("float32", "3.0\n"), ("bfloat16", "3\n")])
def test_jaxlib_accepts_the_flag_and_its_values(
    precision: str, printed: str, tmp_path: Path
) -> None:
    """If a new jaxlib fails here, measure it with benchmarks/speed.py and choose again."""
    assert process._is_known(process._FLAG)
    configured = f"import tljax; tljax.configure('{precision}'); import jax"
    code = f"{configured}; print(jax.numpy.ones(3, '{precision}').sum())"
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"TLJAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == printed


def test_without_a_home_folder_there_is_no_cache(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may run as a user without a name."""
    for name in ("HOME", "TLJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    tljax.configure()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    with pytest.raises(RequestError, match="no home folder: set TLJAX_CACHE"):
        cache_dir()


def test_configuring_after_importing_jax_is_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jax", os)
    with pytest.raises(RequestError, match="comes before `import jax`"):
        tljax.configure()
    assert "XLA_FLAGS" not in os.environ


@pytest.mark.parametrize(
    ("before", "platform", "after"),
    [
        (None, None, None),
        (None, "cpu", "cpu"),
        (None, "gpu", "cuda,cpu"),
        ("cuda", "cpu", "cpu"),
        ("cpu", None, "cpu"),
        ("gpu", "gpu", "gpu"),
    ],
)
def test_a_platform_is_set_before_jax_is_imported(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, before: str, platform, after: str
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", before or "")
    if before is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    tljax.configure(platform=platform)
    assert os.environ.get("JAX_PLATFORMS") == after
