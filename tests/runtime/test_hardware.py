"""GPUs and TPUs that are present, and the line about a JAX that does not use them."""

import subprocess
from pathlib import Path

import pytest

from tljax.runtime import hardware
from tljax.runtime.errors import RequestError
from tljax.runtime.hardware import (
    find_accelerator,
    install_accelerator,
    require_backend,
    require_plugin,
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake a machine without accelerators, whose files are below a folder."""
    monkeypatch.setattr(hardware, "DEV", tmp_path / "dev")
    monkeypatch.setattr(hardware, "PCI", tmp_path / "pci")
    monkeypatch.setattr(hardware, "NVIDIA_VERSION", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(hardware, "find_spec", lambda name: name == "jaxlib" or None)
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", *hardware._TPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def touch(machine: Path, name: str, text: str = "") -> None:
    path = machine / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def nvidia_smi(machine: Path, script: str) -> None:
    touch(machine, "bin/nvidia-smi", f"#!/bin/sh\n{script}\n")
    (machine / "bin" / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize(
    ("files", "accelerator"),
    [
        ([], None),
        (["dev/null"], None),
        (["dev/nvidia0", "dev/nvidiactl"], "gpu"),
        (["dev/nvidiactl"], None),  # a driver without a GPU
        (["dev/accel0", "dev/accel1"], "tpu"),
        (["dev/accel/accel0"], None),  # Linux' own name of accelerators, such as an Intel NPU
        (["dev/vfio/vfio"], None),
        (["dev/vfio/0", "dev/vfio/vfio"], None),  # another device in a virtual machine
        (["dev/dxg"], None),  # Windows with a GPU of another vendor
    ],
)
def test_device_files_tell_which_accelerator_is_present(machine, files, accelerator):
    for name in files:
        touch(machine, name)
    assert find_accelerator() == accelerator


def test_a_tpu_behind_vfio_is_known_by_its_environment_or_its_chip(machine, monkeypatch):
    touch(machine, "dev/vfio/0")
    touch(machine, "pci/0000:00:04.0/vendor", "0x1ae0\n")
    touch(machine, "pci/0000:00:04.0/device", "0x0042\n")  # Google's network card
    assert find_accelerator() is None
    touch(machine, "pci/0000:00:05.0/vendor", "0x1ae0\n")
    touch(machine, "pci/0000:00:05.0/device", "0x0063\n")
    assert find_accelerator() == "tpu"
    (machine / "pci/0000:00:05.0/device").unlink()
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")  # JAX sets it everywhere
    assert find_accelerator() is None
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert find_accelerator() == "tpu"


def test_a_gpu_in_windows_is_known_by_its_program(machine):
    touch(machine, "dev/dxg")
    nvidia_smi(machine, "exit 0")
    assert find_accelerator() == "gpu"


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_hidden_gpu_is_not_present(machine, monkeypatch, value):
    touch(machine, "dev/nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert find_accelerator() is None


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        ('echo "580.65.06, 9.0"', "cuda13"),
        ('echo "590.10, 12.0"; echo "590.10, 7.5"', "cuda13"),
        ('echo "579.99, 9.0"', "cuda12"),
        ('echo "580.65.06, 9.0"; echo "580.65.06, 7.0"', "cuda12"),  # a V100 beside an H100
        ('echo "No devices were found"', "cuda12"),
        ("exit 9", "cuda12"),
    ],
)
def test_the_extra_follows_from_driver_and_compute_capability(machine, script, extra):
    nvidia_smi(machine, script)
    assert install_accelerator("gpu") == f'pip install "tljax[{extra}]"'


@pytest.mark.parametrize(("driver", "extra"), [("580.65.06", "cuda13"), ("550.54.15", "cuda12")])
def test_without_nvidia_smi_the_driver_names_its_version(machine, driver, extra):
    touch(machine, "version", f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue\n")
    assert install_accelerator("gpu") == f'pip install "tljax[{extra}]"'


def test_an_nvidia_smi_that_hangs_is_no_error(machine, monkeypatch):
    def hang(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(hardware.subprocess, "run", hang)
    assert install_accelerator("gpu") == 'pip install "tljax[cuda12]"'


UNUSED = {
    "gpu": 'an NVIDIA GPU is present, but JAX computes on the CPU: pip install "tljax[cuda12]", or '
    "add --platform cpu",
    "tpu": 'a TPU is present, but JAX computes on the CPU: pip install "tljax[tpu]", or add '
    "--platform cpu",
}


@pytest.mark.parametrize(("file", "accelerator"), [("nvidia0", "gpu"), ("accel0", "tpu")])
def test_an_accelerator_without_its_plugin_is_refused(machine, monkeypatch, file, accelerator):
    require_plugin(None)
    require_backend(None, "cpu")
    touch(machine, f"dev/{file}")
    for refuse in (lambda: require_plugin(None), lambda: require_backend(None, "cpu")):
        with pytest.raises(RequestError) as error:
            refuse()
        assert str(error.value) == UNUSED[accelerator]
    require_plugin("cpu")
    require_backend("cpu", "cpu")
    require_backend(None, accelerator)
    monkeypatch.setattr(hardware, "find_spec", lambda _: True)
    require_plugin(None)  # whether the plugin works is known once JAX has started
    with pytest.raises(RequestError, match="is present, but JAX computes on the CPU"):
        require_backend(None, "cpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    require_backend(None, "cpu")


def test_a_requested_platform_that_is_missing_is_refused(machine):
    for refuse in (lambda: require_plugin("gpu"), lambda: require_backend("gpu", "cpu")):
        with pytest.raises(RequestError, match=r"^--platform gpu: JAX finds no such device$"):
            refuse()
    touch(machine, "dev/nvidia0")
    with pytest.raises(RequestError, match=r'no such device: pip install "tljax\[cuda12\]"$'):
        require_plugin("gpu")
    with pytest.raises(RequestError, match=r"^--platform cpu: JAX finds no such device$"):
        require_backend("cpu", "gpu")
