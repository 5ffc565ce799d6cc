"""Measure how a training step scales over devices, compared with jax.pmap; print JSON.

The same batch is divided over 1, 2, 4 and 8 devices. On a CPU the devices are simulated and share
its cores, so the numbers show the overhead of the division.

    python benchmarks/devices.py --weights microsoft/resnet-18 --batch-size 32
"""

import tljax

tljax.configure()

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from ours import random_batch, repeated_step
from peers import environment, take_turns

from tljax.models import apply
from tljax.pretrained import Pretrained, load_pretrained


@dataclass(frozen=True)
class Config:
    """Seconds of a step that trains all parameters, with running batch-norm statistics."""

    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights, as in tljax train."""
    image_size: int | None = None
    """Side of the square images, in pixels; by default what the weights expect."""
    batch_size: int = 32
    """Images per step, over all devices together."""
    counts: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices to measure; those beyond the existing devices are left out."""
    rounds: int = 5
    """Number of timed rounds."""


def pmapped_step(
    network: Pretrained, images: np.ndarray, labels: np.ndarray, devices: int
) -> Callable[[], Any]:
    """Return the same step with jax.pmap: a replica per device, gradients averaged with pmean."""
    model, optimizer = network.model, optax.sgd(1e-6, momentum=0.9)
    statistics = network.variables["batch_stats"]

    def step(params: Any, momentum: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = apply(model, {"params": params, "batch_stats": statistics}, images).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradients = jax.lax.pmean(jax.grad(loss)(params), "devices")
        updates, momentum = optimizer.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), momentum

    pmapped = jax.pmap(
        step, "devices", devices=jax.devices()[:devices], donate_argnums=(0, 1), in_axes=0
    )
    batch = [x.reshape(devices, -1, *x.shape[1:]) for x in (images, labels)]
    params = network.variables["params"]
    state = jax.tree.map(
        lambda x: np.broadcast_to(x, (devices, *np.shape(x))), (params, optimizer.init(params))
    )

    def call() -> Any:
        nonlocal state
        state = pmapped(*state, *batch)
        return state

    return call


def main() -> None:
    config = tyro.cli(Config)
    jax.config.update("jax_num_cpu_devices", max(config.counts))
    network = load_pretrained(config.weights).with_size(config.image_size)
    batch = random_batch(network.model, config.batch_size)
    work: dict[str, Callable[[], Any]] = {}
    for count in config.counts:
        if count <= len(jax.devices()):
            step = repeated_step(network.model, network.variables, *batch, devices=count)
            work[f"tljax {count}"] = lambda step=step: jax.block_until_ready(step())
            pmapped = pmapped_step(network, *batch, count)
            work[f"pmap {count}"] = lambda step=pmapped: jax.block_until_ready(step())
    rows: dict[str, Any] = take_turns(work, config.rounds)
    one = rows[f"tljax {config.counts[0]}"]["seconds"]
    for row in rows.values():
        row["times_as_fast_as_the_first"] = round(one / row["seconds"], 3)
    report = {
        "environment": environment(),
        "weights": Path(config.weights).name,
        "image_size": network.model.preprocess.size,
        "batch_size": config.batch_size,
        "devices": rows,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
