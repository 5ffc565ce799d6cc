"""Exported networks return the same logits, without tljax."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import linen as nn
from networks import random_pretrained, random_variables, run
from PIL import ExifTags, Image

from tljax.data.decode import decode
from tljax.models import Model, Stage
from tljax.models.convolution import max_pool
from tljax.models.layers import Mode
from tljax.pretrained import Card, Pretrained
from tljax.pretrained import deploy as deploy_module
from tljax.pretrained.deploy import export_onnx, export_stablehlo
from tljax.runtime.errors import RequestError, VerificationError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.task import Task

CLASSES = ("cat", "dog", 'a "quoted" 日本 name')


def pretrained(**preprocess: Any) -> Pretrained:
    model = Model("tiny", tiny.MODEL.stages, Preprocess(16, 20, **preprocess))
    card = Card(CLASSES, "somewhere", "MIT", "0" * 64, "tljax")
    return Pretrained(model, tiny.random_variables(), card)


def images(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), np.uint8)


def call(folder: Path, pixels: np.ndarray) -> np.ndarray:
    data = bytearray((folder / "model.stablehlo").read_bytes())
    return np.asarray(jax.export.deserialize(data).call(pixels))


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return nn.Dense(3)(nn.relu(nn.Dense(5)(x)))


def test_a_user_defined_head_is_exported_as_stablehlo(tmp_path: Path):
    stages = (*tiny.MODEL.stages[:-1], Stage("answer", Hidden(), "vector"))
    model = Model("custom", stages, Preprocess(16, 20))
    network = pretrained()._replace(model=model, variables=random_variables(model))
    export_stablehlo(tmp_path, network, batch=2, platforms=["cpu"])
    assert (tmp_path / "predict.py").exists()
    pixels = images(2, 16)
    expected = run(model, network.variables, pixels).logits
    np.testing.assert_allclose(call(tmp_path, pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("tiny", (1, 3)),
        pytest.param("resnet18", (2,), marks=pytest.mark.slow),
        pytest.param("efficientnet_lite0", (2,), marks=pytest.mark.slow),
    ],
)
def test_stablehlo_returns_the_same_logits(tmp_path: Path, name: str, batches: tuple[int, ...]):
    network = pretrained() if name == "tiny" else random_pretrained(name).with_size(64)
    export_stablehlo(tmp_path, network)
    exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    for batch in batches:
        pixels = images(batch, network.model.preprocess.size)
        expected = jax.jit(deploy_module._logits(network))(pixels)
        np.testing.assert_allclose(exported.call(pixels), expected, rtol=1e-4, atol=1e-4)


def test_a_fixed_batch_size_accepts_no_other(tmp_path: Path):
    export_stablehlo(tmp_path, pretrained(), batch=2, platforms=("cpu",))
    assert call(tmp_path, images(2, 16)).shape == (2, 3)
    with pytest.raises(ValueError, match="shape"):
        call(tmp_path, images(3, 16))


def test_an_unknown_platform_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="cannot export for abacus; the platforms are cpu"):
        export_stablehlo(tmp_path, pretrained(), platforms=("abacus",))
    assert not list(tmp_path.iterdir())


# Runs a script in a process where importing tljax or flax fails.
WITHOUT_TLJAX = (
    "import runpy, sys; sys.modules['tljax'] = sys.modules['flax'] = None;"
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
)


def predict_exported(folder: Path, *paths: Path) -> list[str]:
    """Return the lines that the script in an exported folder prints, run without tljax."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TLJAX, folder / "predict.py", *paths],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_exported_script_predicts_without_tljax(tmp_path: Path, interpolation: str):
    network = pretrained(interpolation=interpolation, channel_order="bgr")
    export_stablehlo(tmp_path / "deployed", network)
    rng = np.random.default_rng(1)
    paths, expected = [], []
    for i, (height, width) in enumerate([(37, 61), (50, 33)]):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if i else 1  # the second is rotated
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1], exif=exif)
        pixels = decode(paths[-1].read_bytes(), network.model.preprocess)
        logits = run(network.model, network.variables, pixels[None]).logits[0]
        expected.append(np.asarray(jax.nn.softmax(logits)))

    lines = predict_exported(tmp_path / "deployed", *paths)
    assert len(lines) == 2 * (1 + len(CLASSES))
    for path, probabilities in zip(paths, expected, strict=True):
        first, *guesses = [lines.pop(0) for _ in range(1 + len(CLASSES))]
        assert first == str(path)
        order = np.argsort(-probabilities)
        assert [guess[9:] for guess in guesses] == [CLASSES[i] for i in order]
        shown = [float(guess.split()[0]) for guess in guesses]
        np.testing.assert_allclose(shown, probabilities[order], atol=6e-4)


TASKS = [
    (Task("multilabel"), {"kind": "multilabel", "thresholds": [0.5] * 3}),
    (
        Task("multilabel", thresholds=(0.0, 0.25, 1.0)),
        {"kind": "multilabel", "thresholds": [0.0, 0.25, 1.0]},
    ),
    (
        Task("regression"),
        {"kind": "regression", "mean": [0.0] * 3, "scale": [1.0] * 3, "units": [""] * 3},
    ),
    (
        Task("regression", mean=(50.0, 0.0, -3e6), scale=(12.5, 1.0, 2e6), units=("°", "", "m")),
        {
            "kind": "regression",
            "mean": [50.0, 0.0, -3e6],
            "scale": [12.5, 1.0, 2e6],
            "units": ["°", "", "m"],
        },
    ),
    (Task("ordinal"), {"kind": "ordinal"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "described"), TASKS, ids=lambda x: getattr(x, "kind", ""))
def test_the_exported_script_says_what_each_task_means(
    tmp_path: Path, task: Task, described: dict[str, Any]
):
    network = pretrained()
    names = (*CLASSES, "bird") if task.kind == "ordinal" else CLASSES
    network = network._replace(card=replace(network.card, classes=names, task=task))
    export_stablehlo(tmp_path / "deployed", network, platforms=("cpu",))
    description = json.loads((tmp_path / "deployed" / "model.json").read_text("utf-8"))
    assert description["task"] == described
    path = tmp_path / "0.png"
    Image.fromarray(images(1, 20)[0]).save(path)
    pixels = decode(path.read_bytes(), network.model.preprocess)
    outputs = np.asarray(run(network.model, network.variables, pixels[None]).logits)
    [decoded] = task.decode(outputs)
    first, *lines = predict_exported(tmp_path / "deployed", path)
    assert first == str(path)
    if task.kind == "regression":
        parts = [line.split(": ") for line in lines]
        assert [name.removeprefix("  ") for name, _ in parts] == list(names)
        values = [value.split(" ") for _, value in parts]
        assert [unit for _, *unit in values] == [[x] if x else [] for x in described["units"]]
        shown = [float(value) for value, *_ in values]
        np.testing.assert_allclose(shown, decoded, rtol=1e-4)
        return
    order = np.argsort(-decoded)
    if task.kind == "multilabel":
        order = [i for i in order if task.applies(decoded)[i]]
        assert 0 < len(order) < 3
    assert [line[9:] for line in lines] == [names[i] for i in order]
    shown = [float(line.split()[0]) for line in lines]
    np.testing.assert_allclose(shown, decoded[order], atol=6e-4)


def test_the_exported_script_says_that_no_label_applies(tmp_path: Path):
    network = pretrained()
    task = Task("multilabel", thresholds=(1.0,) * 3)
    network = network._replace(card=replace(network.card, task=task))
    export_stablehlo(tmp_path / "deployed", network, platforms=("cpu",))
    path = tmp_path / "0.png"
    Image.fromarray(images(1, 20)[0]).save(path)
    lines = predict_exported(tmp_path / "deployed", path)
    assert lines == [str(path), "  no label reaches its threshold"]


def test_the_exported_description_is_complete(tmp_path: Path):
    export_stablehlo(tmp_path, pretrained())
    assert json.loads((tmp_path / "model.json").read_text("utf-8")) == {
        "model": "tiny",
        "task": {"kind": "classification"},
        "classes": list(CLASSES),
        "preprocess": {"size": 16, "resize": 20, "interpolation": "bilinear"},
        "source": "somewhere",
        "licence": "MIT",
    }


# ONNX: the rewriting of the graph can be tested without jax2onnx.


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
@pytest.mark.slow
def test_the_rewritten_network_returns_the_same_logits(name: str):
    network = random_pretrained(name).with_size(64)
    function = deploy_module._logits(network)
    rewritten = jax.jit(deploy_module._with_plain_operations(function))
    pixels = images(2, 64)
    used = str(jax.make_jaxpr(rewritten)(pixels))
    assert "reduce_window_max" not in used
    assert "platform_index" not in used
    np.testing.assert_allclose(rewritten(pixels), jax.jit(function)(pixels), rtol=1e-4)


@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, "SAME")])
def test_the_rewritten_pooling_is_exact(k: int, stride: int, padding: Any):
    # All values are negative, so that padding with zeros would show.
    x = -np.random.default_rng(0).random((2, 11, 14, 3), np.float32)

    def pool(x):
        return max_pool(x, k, stride=stride, padding=padding)

    rewritten = deploy_module._with_plain_operations(pool)
    np.testing.assert_array_equal(rewritten(x), pool(x), strict=True)


def test_onnx_without_its_packages_is_refused_with_an_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(RequestError, match=r'jax2onnx: pip install "tljax\[onnx\]"$'):
        export_onnx(tmp_path / "model.onnx", pretrained())


@pytest.mark.filterwarnings("default")  # jax2onnx and its dependencies warn
@pytest.mark.parametrize("name", ["tiny", "resnet18", "efficientnet_lite0"])
def test_onnx_runtime_returns_the_same_logits(tmp_path: Path, name: str):
    pytest.importorskip("jax2onnx", reason="needs tljax[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime")
    network = pretrained() if name == "tiny" else random_pretrained(name).with_size(64)
    export_onnx(tmp_path / "model.onnx", network)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["tljax"])
    assert metadata["task"] == {"kind": "classification"}
    assert tuple(metadata["classes"]) == network.card.classes
    for batch in (1, 3):
        pixels = images(batch, network.model.preprocess.size)
        expected = np.asarray(jax.jit(deploy_module._logits(network))(pixels))
        logits = session.run(["logits"], {"images": pixels})[0]
        np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.filterwarnings("default")
def test_an_onnx_file_says_how_to_read_numbers(tmp_path: Path):
    pytest.importorskip("jax2onnx", reason="needs tljax[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime")
    network, (task, described) = pretrained(), TASKS[3]
    export_onnx(tmp_path / "x.onnx", network._replace(card=replace(network.card, task=task)))
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    assert [output.name for output in session.get_outputs()] == ["outputs"]
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["tljax"])
    assert metadata["task"] == described


@pytest.mark.filterwarnings("default")
def test_a_wrong_onnx_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("jax2onnx", reason="needs tljax[onnx]")
    rewrite = deploy_module._with_plain_operations
    monkeypatch.setattr(
        deploy_module,
        "_with_plain_operations",
        lambda f: lambda x: rewrite(f)(x) + np.float32(0.01),
    )
    with pytest.raises(VerificationError, match=r"differ from JAX's by 0\.01"):
        export_onnx(tmp_path / "model.onnx", pretrained())
    assert not list(tmp_path.iterdir())
