"""TPUs and GPUs to compile programs for on a machine that has none of them.

libtpu compiles for TPUs on any Linux computer, and JAX's CUDA plugin for NVIDIA GPUs without a
driver. `describe_devices` gives the devices of a machine by its name; they take the place of
`jax.devices()` in a mesh, and arguments are `jax.ShapeDtypeStruct` with a sharding on it.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import Any, Literal

from tljax.runtime.errors import RequestError
from tljax.runtime.packages import install_command

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one TPU chip or GPU can do.

    Attributes:
        name: name in `Machine` names.
        kind: ``tpu`` or ``gpu``.
        memory: bytes that programs may use, as the compiler says.
        bandwidth: bytes per second of the memory.
        flops: operations per second of matrix products in bfloat16.
        flops_float32: the same in float32: on a GPU in TensorFloat-32, on a TPU in bfloat16 passes.
        clock: cycles per second that the TPU compiler's estimates are in.
        hosts: numbers of chips that one host has.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    memory: int
    bandwidth: float
    flops: float
    flops_float32: float
    clock: float
    hosts: tuple[int, ...]


def _tpu(
    name: str, memory: float, bandwidth: float, flops: float, clock: float, hosts: tuple[int, ...]
) -> Chip:
    """Describe a TPU in GiB, GB/s, TFLOP/s and GHz; its products of float32 are of one pass."""
    rate = 1e12 * flops
    return Chip(name, "tpu", int(memory * _GIB), 1e9 * bandwidth, rate, rate, 1e9 * clock, hosts)


def _gpu(name: str, memory: int, bandwidth: float, flops: float, clock: float) -> Chip:
    """Describe a GPU in bytes, GB/s, TFLOP/s and GHz."""
    rate = 1e12 * flops
    return Chip(
        name, "gpu", memory, 1e9 * bandwidth, rate, rate / 2, 1e9 * clock, tuple(range(1, 9))
    )


# Google Cloud's pages on each generation, NVIDIA's data sheets of the SXM cards without sparsity;
# the memory is what the compilers accept.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 30.75, 1228, 275, 1.05, (4,)),
        _tpu("v5e", 15.75, 819, 197, 1.5, (1, 4, 8)),
        _tpu("v5p", 95.74, 2765, 459, 1.75, (4,)),
        _tpu("v6e", 31.25, 1640, 918, 1.75, (1, 4, 8)),
        _gpu("h100", 84_929_347_584, 3352, 989, 1.98),
        _gpu("h200", 143_771 * 2**20, 4800, 989, 1.98),
        _gpu("a100", 42_298_834_944, 1555, 312, 1.41),
    )
}

_TWO_CORES = ("v4", "v5p")
"""Generations whose machines are named by their number of cores, two a chip."""


@dataclass(frozen=True)
class Machine:
    """Chips of one kind on one or several hosts.

    Attributes:
        name: name as the machine is rented by, such as ``v5e-8``.
        chip: what one chip is.
        shape: number of chips along each axis of a TPU's network; one axis for GPUs.
        slices: number of such networks, which only their hosts connect.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Return the number of chips of all slices, each of which is one device of JAX."""
        return self.slices * prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        """Return the number of chips of one host."""
        chips = prod(self.shape)
        return chips if chips in self.chip.hosts else min(4, chips)

    @property
    def hosts(self) -> int:
        """Return the number of hosts."""
        return self.chips // self.chips_per_host

    @property
    def usable_memory(self) -> int:
        """Return the bytes a chip that programs get: of a GPU, the 75% that JAX reserves."""
        return self.chip.memory if self.chip.kind == "tpu" else self.chip.memory * 3 // 4

    def __str__(self) -> str:
        """Describe the machine in words."""
        chips = f"{self.chips} chip{'s' if self.chips > 1 else ''}"
        chips += f" in {self.slices} slices" if self.slices > 1 else ""
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''}"
        memory = f"{self.usable_memory / _GIB:.2f} GiB of memory a chip"
        return f"{self.name}: {chips} on {hosts}, {memory}"


def parse_machine(name: str) -> Machine:
    """Return the machine of a name such as ``v5e-8``, ``v4-32``, ``2xv5e-256`` or ``h100-8``.

    The numbers are those of Google Cloud's names: of chips for v5e and v6e, of cores for v4 and
    v5p, two a chip. ``2x`` means two slices. For GPUs it is their number in one host.

    Raises:
        RequestError: there is no such machine.
    """
    match = re.fullmatch(r"(?:([1-9]\d?)x)?([a-z]\w*?)(?:-(\d{1,6}))?", name.lower())
    chip = match and CHIPS.get({"v5litepod": "v5e"}.get(match[2], match[2]))
    if not match or not chip:
        names = ", ".join(CHIPS)
        raise RequestError(
            f"--on {name}: no such machine: name a chip ({names}) and how many, as v5e-8"
        )
    slices = int(match[1] or 1)
    if slices > 1 and chip.kind == "gpu":
        raise RequestError(f"--on {name}: only TPUs come in slices")
    cores = 2 if chip.name in _TWO_CORES else 1
    count = int(match[3] or chip.hosts[0] * cores)
    sizes = _sizes(chip)
    if count % cores or count // cores not in sizes:
        known = ", ".join(f"{chip.name}-{cores * size}" for size in sizes)
        raise RequestError(f"--on {name}: no such number of chips: choose from {known}")
    one = f"{chip.name}-{count}"
    shape = sizes[count // cores]
    return Machine(f"{slices}x{one}" if slices > 1 else one, chip, shape, slices)


def _sizes(chip: Chip) -> dict[int, tuple[int, ...]]:
    """Return the shape of the machines of a chip, by their number of chips."""
    if chip.kind == "gpu":
        return {count: (count,) for count in chip.hosts}
    if chip.name in _TWO_CORES:
        shapes = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)]
        shapes += [(8, 8, 8), (8, 8, 16), (8, 16, 16)]
    else:
        shapes = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    return {prod(shape): shape for shape in shapes}


_COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}
"""Distributions by kind of chip."""


def require_compiler(chip: Chip) -> None:
    """Check that the compiler for a chip is installed.

    Raises:
        RequestError: it is not; the line says how to install it.
    """
    package = _COMPILERS[chip.kind]
    if find_spec(package.replace("-", "_")) is None:
        raise RequestError(
            f"--on {chip.name}: its compiler is not installed: {install_command(package)}"
        )


def configure_compilers() -> None:
    """Set the environment in which JAX and libtpu look for no device; before JAX is imported."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR="",  # what is read from it says neither memory nor duration
        CUDA_VISIBLE_DEVICES="-1",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",  # what libtpu would have heard
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TF_CPP_MIN_LOG_LEVEL="3",
    )


def describe_devices(machine: Machine) -> list[Any]:
    """Return the devices of a machine, for a mesh; programs are compiled for them, not run.

    Raises:
        RequestError: the compiler is not installed.
    """
    from jax.experimental import topologies  # noqa: PLC0415 - after `configure_compilers`

    require_compiler(machine.chip)
    get: Callable[..., Any] = topologies.get_topology_desc
    get = partial(get, platform="tpu" if machine.chip.kind == "tpu" else "cuda")
    if machine.chip.kind == "gpu":
        target = _gpu_target(machine.chip)
        return list(get(target_config=target, topology=f"1x1x{machine.chips}").devices)
    options: dict[str, Any] = {"num_slices": machine.slices} if machine.slices > 1 else {}
    if machine.hosts == machine.slices and len(machine.shape) == 2:
        options["chips_per_host_bounds"] = (*machine.shape, 1)
    if machine.chip.name == "v4":  # one device a chip, as on the machines
        options["chip_config_name"] = "megacore"
    name = f"{machine.chip.name}:{'x'.join(map(str, machine.shape))}"
    return list(get(topology_name=name, **options).devices)


_GPU_FIELDS = {
    # cores, threads and float32 units a core, bytes of shared memory a core, of L2, capability
    "h100": (132, 2048, 128, 233_472, 52_428_800, (9, 0), "NVIDIA H100 80GB HBM3"),
    "h200": (132, 2048, 128, 233_472, 52_428_800, (9, 0), "NVIDIA H200"),
    "a100": (108, 2048, 64, 167_936, 41_943_040, (8, 0), "NVIDIA A100-SXM4-40GB"),
}


def _gpu_target(chip: Chip) -> str:
    """Return XLA's ``GpuTargetConfigProto`` of a card, as text."""
    cores, threads, units, shared, l2, (major, minor), description = _GPU_FIELDS[chip.name]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": threads,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": l2,
        "clock_rate_ghz": chip.clock / 1e9,
        "device_memory_size": chip.memory,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f'gpu_device_info {{ {fields} {capability} }} platform_name: "CUDA" '
        "dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 } "
        f'device_description_str: "{description}"'
    )
