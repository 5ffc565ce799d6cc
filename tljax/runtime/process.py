"""Configuration of JAX's compiler, which must happen before JAX is imported."""

import os
import platform
import sys
import warnings
from contextlib import suppress
from importlib.util import find_spec
from mmap import ACCESS_READ, mmap
from pathlib import Path

from tljax.runtime.errors import RequestError
from tljax.runtime.files import cache_dir, sha256
from tljax.runtime.settings import Dtype, Platform

# On a CPU jaxlib computes convolutions and matrix products with YNNPACK. With its convolutions a
# training step takes up to twice as long as with XLA's own; its reductions are fast, and so are its
# matrix products in bfloat16, but not in float32. Measured with jaxlib 0.10.2 and 0.12.0.
_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_YNNPACK_OPERATIONS = {
    "float32": "LIBRARY_FUSION_TYPE_REDUCE",
    "bfloat16": "-individual_convolution",
}
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def configure(precision: Dtype = "float32", platform: Platform | None = None) -> None:
    """Speed up convolutions on a CPU and enable JAX's persistent compilation cache.

    Every command calls this; your own program may call it before it imports JAX. Existing settings
    are respected: ``JAX_COMPILATION_CACHE_DIR`` (an empty value disables the cache) and any ``ynn``
    flag in ``XLA_FLAGS``. If the cache folder cannot be written, the cache is silently disabled.

    Args:
        precision: dtype of most computations; others work too, but more slowly.
        platform: ``cpu``, ``gpu`` (NVIDIA) or ``tpu``, which sets ``JAX_PLATFORMS``; None leaves
            the choice to JAX.

    Raises:
        RequestError: JAX was imported before, so the settings would have no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    settings: dict[str, str] = {}
    if "_ynn_" not in flags and _is_known(_FLAG):
        settings["XLA_FLAGS"] = f"{flags} --{_FLAG}={_YNNPACK_OPERATIONS[precision]}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(RequestError):  # without a home folder there is no cache
            settings["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir() / "compiled" / _machine())
    if platform and os.environ.get("JAX_PLATFORMS") not in (platform, _PLATFORMS[platform]):
        settings["JAX_PLATFORMS"] = _PLATFORMS[platform]
    if settings and "jax" in sys.modules:
        raise RequestError("tljax.configure() comes before `import jax`; start Python again")
    os.environ.update(settings)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _is_known(flag: str) -> bool:
    """Return True if this jaxlib has a flag; XLA aborts the process at an unknown flag."""
    spec = find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("*jax_common.*"):
            with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as code:
                if code.find(flag.encode()) >= 0:
                    return True
    return False


def _machine() -> str:
    """Return an identifier of the processor, whose instruction set compiled programs depend on."""
    features, cpu = "", Path("/proc/cpuinfo")
    if cpu.exists():  # one line is enough: all cores have the same features
        with cpu.open(encoding="utf-8", errors="replace") as lines:
            features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sha256(f"{platform.machine()} {features}".encode())[:16]
