"""Attacks on tiny networks take longer to compile than to run."""

import jax
import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def quick_to_compile():
    name = "jax_disable_most_optimizations"
    before, threads = jax.config.values[name], torch.get_num_threads()
    jax.config.update(name, True)
    torch.set_num_threads(1)
    yield
    jax.config.update(name, before)
    torch.set_num_threads(threads)
