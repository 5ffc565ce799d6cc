"""The command ``tljax doctor``: check the installation, the devices and the cache folder."""

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from tempfile import TemporaryFile
from typing import Any

from tljax.commands import cli
from tljax.runtime.errors import RequestError, first_line
from tljax.runtime.files import cache_dir
from tljax.runtime.hardware import require_backend
from tljax.runtime.packages import EXTRAS, install_command


@dataclass(frozen=True)
class Config(cli.Output):
    """Check versions, devices, memory and the cache folder, and print how to fix problems.

    The exit code is 0 if all is well and 1 if there is a problem.
    """


_CORE = ("tljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIB = 2**30


def run(config: Config) -> dict[str, Any]:
    """Print the state of the installation, and for each problem a line that says how to fix it."""
    import psutil

    from tljax.runtime.tables import format_table

    core = {name: find_version(name) for name in _CORE}
    optional = {name: find_version(name) for name in EXTRAS}
    devices, device_problems = check_devices(config)
    cache, cache_problems = check_cache()
    problems = [*check_dependencies(), *device_problems, *cache_problems]
    memory = psutil.virtual_memory()
    rows = [
        ("python", platform.python_version()),
        *((name, found or "not installed") for name, found in core.items()),
        *(
            (name, found or f"optional: {install_command(name)}")
            for name, found in optional.items()
        ),
        *(("device", describe_device(device)) for device in devices),
        ("memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"),
        ("cache", cache),
    ]
    print(format_table(("", ""), rows, left=2))
    print("\n".join(f"problem: {line}" for line in problems) or "all is well")
    return {
        "python": platform.python_version(),
        "versions": core,
        "optional": optional,
        "devices": devices,
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "cache": cache,
        "problems": problems,
    }


def find_version(package: str) -> str | None:
    """Return the version of an installed distribution, and None if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_dependencies() -> list[str]:
    """Return a line for each dependency of tljax that is missing or has a wrong version."""
    from packaging.requirements import Requirement

    lines = []
    declared = requires("tljax") if find_version("tljax") else None
    for requirement in map(Requirement, declared or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = find_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            state = f"is {found}" if found else "is not installed"
            lines.append(f'{requirement.name} {state}: pip install "{requirement}"')
    return lines


def check_devices(config: cli.Output) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a record of every device that JAX uses, and a line for each problem with them."""
    try:
        import jax

        devices, backend = jax.devices(), jax.default_backend()
    except (AssertionError, ImportError, RuntimeError) as error:
        return [], [f"JAX does not start: {first_line(error)}"]
    records = []
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        records.append({"backend": backend, "kind": device.device_kind, "memory_bytes": limit})
    try:
        require_backend(config.platform, backend)
    except RequestError as error:
        return records, [str(error)]
    return records, []


def describe_device(record: dict[str, Any]) -> str:
    """Return a record of `check_devices` as text."""
    memory = record["memory_bytes"]
    size = f", {memory / _GIB:.1f} GiB for JAX" if memory else ""
    return f"{record['backend']}{cli.format_kind(record['backend'], record['kind'])}{size}"


def check_cache() -> tuple[str, list[str]]:
    """Return a description of the cache folder, and a line if it cannot be written."""
    try:
        folder = cache_dir()
    except RequestError as error:
        return "none", [str(error)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return f"{folder}, {shutil.disk_usage(folder).free / _GIB:.1f} GiB free", []
    except OSError as error:
        advice = "set TLJAX_CACHE to a folder that can be written"
        problem = f"{folder} cannot be written ({error.strerror}): {advice}"
        return f"{folder}, cannot be written", [problem]
