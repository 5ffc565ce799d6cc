"""Free memory of the host and of a device."""

from contextlib import suppress
from pathlib import Path

import jax
import psutil


def device_memory() -> int | None:
    """Return the bytes that a program may use on one device; None if unknown, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats and stats.get("bytes_limit")


def free_device_memory() -> int:
    """Return the bytes of free memory of one device; on a CPU, its share of the host's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return free_memory() // jax.local_device_count()


_CGROUPS = {
    "": ("memory.max", "memory.current"),  # version 2
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of free host memory, within the limits of the containers (cgroups)."""
    free = [psutil.virtual_memory().available]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kind, group = line.split(":", 2)
        below = Path(group.lstrip("/"))
        for part in (below, *below.parents) if kind in _CGROUPS else ():
            folder = root / "sys/fs/cgroup" / kind / part
            # Without a limit, "max" is read. Outer groups are invisible in a container.
            with suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in _CGROUPS[kind])
                # Linux frees cached files on demand.
                cached = (folder / "memory.stat").read_text().rpartition("inactive_file ")[2]
                free.append(limit - used + int(cached.split()[0]))
    return max(0, min(free))
