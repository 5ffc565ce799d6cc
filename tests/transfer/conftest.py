"""The tiny network for every test of this room."""

import jax
import pytest
import tiny as tiny_network


@pytest.fixture
def tiny():
    """(model, variables), fresh for every test."""
    return tiny_network.MODEL, tiny_network.random_variables()


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """Compiles the same program once in a session: every run of `fit` jits its own step."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield options["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)
