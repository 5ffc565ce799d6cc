"""Detection of GPUs and TPUs that JAX cannot use. Imports no JAX: `configure` comes before it."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Platform

DEV, PCI = Path("/dev"), Path("/sys/bus/pci/devices")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")

_GOOGLE = "0x1ae0"
_TPU_CHIPS = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # v2 and v3 to v7x
_PLUGINS = {
    "cpu": ("jaxlib",),
    "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "tpu": ("libtpu",),
}
# JAX sets other variables of this prefix wherever it is imported.
_TPU_VARIABLES = {"TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"}
_NAMES = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}


def find_accelerator() -> Platform | None:
    """Return ``"tpu"`` or ``"gpu"`` if this machine shows such a device, and None otherwise.

    A GPU is an NVIDIA GPU that ``CUDA_VISIBLE_DEVICES`` does not hide.
    """
    if any(DEV.glob("accel[0-9]*")) or (any(DEV.glob("vfio/[0-9]*")) and _has_tpu()):
        return "tpu"
    windows = (DEV / "dxg").exists() and shutil.which("nvidia-smi") is not None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "gpu" if (any(DEV.glob("nvidia[0-9]*")) or windows) and not hidden else None


def _has_tpu() -> bool:
    """Tell a TPU from other devices that a virtual machine passes through."""

    def read(path: Path) -> str:
        return path.read_text("ascii").strip() if path.exists() else ""

    return not _TPU_VARIABLES.isdisjoint(os.environ) or any(
        read(chip / "vendor") == _GOOGLE and read(chip / "device") in _TPU_CHIPS
        for chip in PCI.glob("*")
    )


def install_accelerator(accelerator: Platform) -> str:
    """Return the command that installs JAX for an accelerator of this machine.

    For a GPU the extra follows from its driver and compute capability: CUDA 13 needs driver 580 and
    capability 7.5, CUDA 12 driver 525.
    """
    extra = "tpu" if accelerator == "tpu" else "cuda13" if _takes_cuda13() else "cuda12"
    return f'pip install "tljax[{extra}]"'


def _takes_cuda13() -> bool:
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
        lines = done.stdout.splitlines()
        rows = [tuple(map(float, re.findall(r"(\d+\.\d+)", line))) for line in lines]
        return bool(rows) and all(row >= (580.0,) and row[-1] >= 7.5 for row in rows)
    except (OSError, subprocess.SubprocessError):
        text = NVIDIA_VERSION.read_text("utf-8") if NVIDIA_VERSION.exists() else ""
        driver = re.search(r"\b(\d{3})\.\d", text)
        return driver is not None and int(driver[1]) >= 580


def require_plugin(platform: Platform | None) -> None:
    """Refuse a platform that JAX has no plugin for; JAX need not be imported.

    Args:
        platform: cpu, gpu or tpu; None is what JAX finds, or ``JAX_PLATFORMS`` if that is set.

    Raises:
        RequestError: a GPU or TPU is present, or requested, and no plugin for it is installed.
    """
    accelerator = platform or _expected()
    if accelerator and not any(map(find_spec, _PLUGINS[accelerator])):
        require_backend(platform, "cpu")


def require_backend(platform: Platform | None, backend: str) -> None:
    """Refuse JAX's default backend if it is not the requested one or ignores an accelerator.

    Args:
        platform: as for `require_plugin`.
        backend: JAX's default backend.

    Raises:
        RequestError: the backend differs from ``platform``; or it is cpu, a GPU or TPU is
            present, and neither ``platform`` nor ``JAX_PLATFORMS`` is set.
    """
    present = find_accelerator()
    if platform not in (None, backend):
        advice = f": {install_accelerator(platform)}" if present == platform else ""
        raise RequestError(f"--platform {platform}: JAX finds no such device{advice}")
    if platform is None and backend == "cpu" and (accelerator := _expected()):
        raise RequestError(
            f"{_NAMES[accelerator]} is present, but JAX computes on the CPU: "
            f"{install_accelerator(accelerator)}, or add --platform cpu"
        )


def _expected() -> Platform | None:
    """Return the accelerator that JAX should use by default."""
    return None if os.environ.get("JAX_PLATFORMS") else find_accelerator()
