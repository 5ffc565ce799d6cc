"""Compile training steps, and measure the memory of a device that each needs; print JSON.

Nothing is allocated and no step runs, so networks that do not fit this machine can be measured.
The batch and, with fsdp, the parameters are divided over simulated devices:

    python benchmarks/memory.py --model vit_large_patch16_224 --batch-size 8
"""

import tljax

tljax.configure()

import json
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from tljax.models import abstract_variables, build_model
from tljax.runtime.parallel import data_mesh, fsdp_sharding
from tljax.runtime.settings import Dtype
from tljax.runtime.types import Batch
from tljax.train import run_directory
from tljax.train.memory import memory_options
from tljax.train.step import init_state, make_train_step


@dataclass(frozen=True)
class Config:
    """Bytes of a device during a step of AdamW that trains all parameters."""

    model: str = "vit_large_patch16_224"
    """The network; see tljax.models.MODELS."""
    batch_size: int = 8
    """Images per device."""
    devices: int = 8
    """Number of simulated devices of the steps with fsdp; the others have one."""
    dtype: Dtype = "float32"
    """The dtype of the computation."""


def step_memory(config: Config, *, devices: int, remat: bool, fsdp: bool) -> dict[str, float]:
    """Return MiB of a device: of the state, of all that a step computes, and of both at once."""
    mesh = data_mesh(devices)
    model = replace(build_model(config.model, 1000), dtype=config.dtype)
    optimizer = optax.adamw(1e-4)
    state = jax.eval_shape(
        lambda v: init_state(v["params"], v["batch_stats"], optimizer), abstract_variables(model)
    )
    whole = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec("data"))
    count = config.batch_size * devices

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(sharding=fsdp_sharding(x.shape, mesh) if fsdp else whole)

    def rows(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=divided)

    batch = Batch(
        rows(model.preprocess.shape, np.uint8),
        rows((), np.int32),
        rows((), np.bool_),
        rows((), np.int32),
    )
    keys = jax.eval_shape(lambda: (jax.random.key(0), jax.random.key(1)))
    keys = jax.tree.map(lambda key: key.update(sharding=whole), keys)
    options = memory_options(mesh, remat=remat, fsdp=fsdp)
    step = make_train_step(model, optimizer, **options)
    lowered = step.lower(  # pyright: ignore[reportFunctionMemberAccess]
        jax.tree.map(place, state), {"params": {}, "batch_stats": {}}, batch, keys
    )
    memory = lowered.compile().memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes
    state_bytes = memory.alias_size_in_bytes  # the state is donated
    mib = {
        "state_mib": state_bytes,
        "activations_and_gradients_mib": memory.temp_size_in_bytes,
        "peak_mib": size - state_bytes + memory.temp_size_in_bytes,
    }
    return {name: round(value / 2**20, 1) for name, value in mib.items()}


def main() -> None:
    config = tyro.cli(Config)
    jax.config.update("jax_num_cpu_devices", config.devices)
    steps = {
        "one device": (1, False, False),
        "one device, remat": (1, True, False),
        f"{config.devices} devices": (config.devices, False, False),
        f"{config.devices} devices, fsdp": (config.devices, False, True),
        f"{config.devices} devices, fsdp and remat": (config.devices, True, True),
    }
    report = {
        "environment": run_directory.environment(),
        "model": config.model,
        "image_size": build_model(config.model).preprocess.size,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "steps": {
            name: step_memory(config, devices=count, remat=remat, fsdp=fsdp)
            for name, (count, remat, fsdp) in steps.items()
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
