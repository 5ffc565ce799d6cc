"""Estimate what bounds training: loading images, moving them to the devices, or the step."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tljax.runtime.parallel import shard
from tljax.runtime.types import Batch

_SECONDS = 1.0  # that images are loaded for, once the first batch has come


def loading_rate(batches: Iterator[Batch]) -> float:
    """Measure how many images per second an iterator yields within a second.

    The first batch is left out, as workers start with it, unless it is the only one.
    """
    began = time.perf_counter()
    first = next(batches)
    ready = time.perf_counter()
    images, elapsed = 0, 0.0
    for batch in batches:
        images += batch.num_examples
        elapsed = time.perf_counter() - ready
        if elapsed > _SECONDS:
            break
    return images / elapsed if images else first.num_examples / (ready - began)


def transfer_rate(batch: Batch, mesh: Mesh) -> float:
    """Measure how many images per second are moved to the devices: the best of three batches."""

    def move() -> float:
        began = time.perf_counter()
        jax.block_until_ready(shard(batch, mesh))
        return time.perf_counter() - began

    return len(batch.mask) / min(move() for _ in range(3))


def matmul_rate(dtype: str, devices: int) -> float:
    """Measure the floating-point operations per second of a product of matrices, times devices."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x: x @ x)

    def multiply() -> float:
        began = time.perf_counter()
        jax.block_until_ready(product(x))
        return time.perf_counter() - began

    multiply()
    return 2 * n**3 * devices / min(multiply() for _ in range(3))


def describe_rates(loading: float, transfer: float, step: float) -> str:
    """Describe images per second in one line, and what is the slowest."""
    rates = {"loading": loading, "transfer": transfer, "the step": step}
    slowest = min(rates, key=lambda name: rates[name])
    return (
        f"images/s: loading {loading:,.0f}, transfer to the devices {transfer:,.0f}, the step"
        f" about {step:,.0f} (its operations at the rate of a matrix product): {slowest} bounds"
    )
