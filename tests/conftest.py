"""Fixtures that every room's tests share."""

import lzma
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

os.environ["KERAS_BACKEND"] = "jax"  # it is read when keras is imported

# What one test or script has compiled no other compiles again. It is read when JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import tljax  # noqa: E402

tljax.configure()

import jax  # noqa: E402
import tiny as tiny_network  # noqa: E402


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not part of the repository")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real ImageNet ResNets, unpacked."""
    packed = sorted((SHARED / "weights").glob("*.safetensors.xz"))
    if not packed:
        pytest.skip("needs the networks of ../shared/weights, which are not part of the repository")
    folder = tmp_path_factory.mktemp("weights")
    for path in packed:
        (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def quick_to_compile():
    """For tiny networks, which take longer to compile than to run."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


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
