"""How JAX compiles in this process; it has to be settled before JAX is imported."""

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
from tljax.runtime.settings import Dtype

# jaxlib hands convolutions and products on a CPU to YNNPACK. With its convolutions a training step
# takes up to twice as long as with XLA's own; its sums are good, and so are its products of
# bfloat16, but not those of float32. Measured with 0.10.2 and 0.12.0.
_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_LEFT_TO_IT = {"float32": "LIBRARY_FUSION_TYPE_REDUCE", "bfloat16": "-individual_convolution"}


def configure(precision: Dtype = "float32") -> None:
    """Speed up convolutions on a CPU, and keep compiled programs on disk for the next run.

    Every command does this; a program of its own may, before it imports JAX. What is set already
    wins: ``JAX_COMPILATION_CACHE_DIR``, which when empty keeps nothing, and a flag for ``ynn`` in
    ``XLA_FLAGS``. Where the folder cannot be written, nothing is kept and nothing is said.

    Args:
        precision: what most of the work will be computed in. All else works, too, but not as fast.

    Raises:
        RequestError: JAX has been imported, and would not notice.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    settings: dict[str, str] = {}
    if "_ynn_" not in flags and _is_known(_FLAG):
        settings["XLA_FLAGS"] = f"{flags} --{_FLAG}={_LEFT_TO_IT[precision]}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(RequestError):  # without a home, programs are compiled anew
            settings["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir() / "compiled" / _machine())
    if settings and "jax" in sys.modules:
        raise RequestError("tljax.configure() comes before `import jax`; start Python again")
    os.environ.update(settings)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _is_known(flag: str) -> bool:
    """Look whether this jaxlib has a flag: XLA ends the process at one that it does not know."""
    spec = find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("*jax_common.*"):
            with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as code:
                if code.find(flag.encode()) >= 0:
                    return True
    return False


def _machine() -> str:
    """Name its processor: code compiled for another may hold instructions that this one lacks."""
    features, cpu = "", Path("/proc/cpuinfo")
    if cpu.exists():  # it is long where there are many processors, and says the same of each
        with cpu.open(encoding="utf-8", errors="replace") as lines:
            features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:16]
