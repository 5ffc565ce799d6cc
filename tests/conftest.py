"""Fixtures that all tests share."""

import gc
import lzma
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Collections walk over all programs traced so far, an eighth of the time by default.
gc.set_threshold(200_000, 20, 50)

os.environ["KERAS_BACKEND"] = "jax"  # read when keras is imported

# Tests and scripts share one compilation cache. The variables are read when JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import tljax  # noqa: E402

tljax.configure()

import jax  # noqa: E402
import tiny as tiny_network  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Disable most optimizations in the quick suite, which compiles longer than it runs.

    All tests together check the programs that users run.
    """
    if config.option.markexpr == "not slow":
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real photographs next to the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not part of the repository")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the real ImageNet ResNets into a folder."""
    packed = sorted((SHARED / "weights").glob("*.safetensors.xz"))
    if not packed:
        pytest.skip("needs the networks of ../shared/weights, which are not part of the repository")
    folder = tmp_path_factory.mktemp("weights")
    for path in packed:
        (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def quick_to_compile():
    """Disable most optimizations, for tiny networks that compile longer than they run."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture
def tiny():
    """Return a model and new variables for every test."""
    return tiny_network.MODEL, tiny_network.random_variables()


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """Compile equal programs once per session: every call of `fit` jits a new step."""
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
