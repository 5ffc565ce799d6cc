"""Settings of JAX for this process, which must be made before JAX is imported."""

import hashlib
import os
import platform
import sys
import warnings
from contextlib import suppress
from importlib.util import find_spec
from mmap import ACCESS_READ, mmap
from pathlib import Path

from tljax.runtime.errors import RequestError
from tljax.runtime.files import cache_dir
from tljax.runtime.settings import Dtype, Platform

# jaxlib computes convolutions and matrix products on a CPU with YNNPACK. With its convolutions a
# training step takes up to twice as long as with XLA's own; its reductions are fast, and so are its
# products of bfloat16, but not those of float32. Measured with 0.10.2 and 0.12.0.
_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_FUSIONS = {"float32": "LIBRARY_FUSION_TYPE_REDUCE", "bfloat16": "-individual_convolution"}
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def configure(precision: Dtype = "float32", platform: Platform | None = None) -> None:
    """Speed up convolutions on a CPU, and cache compiled programs on disk for later runs.

    Every command calls this; other programs may call it before they import JAX. Variables that are
    set already take precedence: ``JAX_COMPILATION_CACHE_DIR``, which disables the cache when it is
    empty, and a flag for ``ynn`` in ``XLA_FLAGS``. A folder that cannot be written is no error:
    nothing is cached.

    Args:
        precision: dtype of most computations. Others work too, but are slower.
        platform: ``cpu``, ``gpu`` (NVIDIA) or ``tpu``, which sets ``JAX_PLATFORMS``; None leaves
            the choice to JAX.

    Raises:
        RequestError: JAX has been imported already, so that new settings would have no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    settings: dict[str, str] = {}
    if "_ynn_" not in flags and _is_known(_FLAG):
        settings["XLA_FLAGS"] = f"{flags} --{_FLAG}={_FUSIONS[precision]}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(RequestError):  # without a home folder nothing is cached
            settings["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir() / "compiled" / _machine())
    if platform and os.environ.get("JAX_PLATFORMS") not in (platform, _PLATFORMS[platform]):
        settings["JAX_PLATFORMS"] = _PLATFORMS[platform]
    if settings and "jax" in sys.modules:
        raise RequestError("call tljax.configure() before `import jax`: start Python again")
    os.environ.update(settings)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _is_known(flag: str) -> bool:
    """Return whether this jaxlib has a flag: XLA ends the process at an unknown one."""
    spec = find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("*jax_common.*"):
            with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as code:
                if code.find(flag.encode()) >= 0:
                    return True
    return False


def _machine() -> str:
    """Return a hash of the processor's features: compiled code may use instructions of its own."""
    features, cpu = "", Path("/proc/cpuinfo")
    if cpu.exists():  # the file repeats the features for every processor: read them once
        with cpu.open(encoding="utf-8", errors="replace") as lines:
            features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:16]
