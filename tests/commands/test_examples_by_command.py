"""The commands in the docstrings of the examples, and the networks that they train."""

import ast
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from networks import random_pretrained
from test_scripts import answer, call_script, paint

import tljax
from tljax.commands.extension import load_extension

EXAMPLES = Path(__file__).parents[2] / "examples"


def commands(path: Path) -> list[str]:
    """Return the lines of an example's docstring that begin with ``tljax train``."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return [line.strip() for line in text.splitlines() if line.strip().startswith("tljax train")]


def cases() -> list[object]:
    """Return all such lines, marked slow but for one."""
    return [
        pytest.param(path, line, id=path.stem, marks=[pytest.mark.slow] * (path.stem != quick))
        for quick in ("two_layer_head",)
        for path in sorted(EXAMPLES.glob("*.py"))
        for line in commands(path)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "line"), cases())
def test_an_example_is_trained_and_served_by_the_commands(
    path: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = {"tensorboard_logging": "tensorboardX", "wandb_logging": "wandb"}.get(path.stem)
    if package:
        pytest.importorskip(package)
    tljax.save(tmp_path / "net.safetensors", random_pretrained("mobilenetv2_050", 5))
    for i in range(16):
        paint(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", (200 * (i % 2), 60, 60), i)
    _, name, *options = shlex.split(line.replace("FOLDER", str(tmp_path / "data")))
    options = [option.replace("examples/", f"{EXAMPLES}/") for option in options]
    small = ("--weights", tmp_path / "net.safetensors", "--image-size", "32", "--epochs", "1")
    folder = tmp_path / "run"
    answer(call_script(tmp_path, name, *options, *small, "--workdir", folder, "--json"))

    more = ("--extension", path) if "--extension" in line else ()
    photograph = tmp_path / "data" / "a" / "0.png"
    served = call_script(tmp_path, "predict", photograph, "--weights", folder, *more, "--json")
    [found] = answer(served)["images"]
    if path.stem == "two_layer_head":  # its network holds a module of the extension
        for command in (("predict", photograph, "--weights"), ("evaluate", "--workdir")):
            refused = call_script(tmp_path, *command, folder)
            assert (refused.returncode, refused.stdout) == (2, "")
            assert refused.stderr == (
                f"error: {folder}: its network needs the modules of the extension it was trained "
                f"with: add --extension {path}:extension, which runs that file\n"
            )
    modules = load_extension(str(path))[0].get("modules") if more else None
    model, variables, card = tljax.load_pretrained(folder, modules=modules)
    images = tljax.read_images([photograph], model.preprocess)
    logits = np.asarray(tljax.apply(model, variables, images).logits[0])
    for guess in found["top"]:
        assert card.classes[guess["index"]] == guess["name"]
        expected = float(jax.nn.softmax(logits)[guess["index"]])
        assert guess["probability"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
