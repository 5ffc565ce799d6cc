"""Every network, loaded from each of its formats, compared with its reference implementation."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import difference, random_images, random_variables
from parity import stage_differences
from references import FAST, REFERENCES, SHAPES
from references.efficientnet import TRANSFORMERS as EFFICIENTNETS

from tljax.attack import fgsm
from tljax.explain import grad_cam
from tljax.models import MODELS, Model, apply, build_model, feature_map, grad_cam_stage, vit
from tljax.pretrained import load_pretrained
from tljax.pretrained.identify import identify
from tljax.pretrained.tables.layouts import LAYOUTS
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Variables

TOLERANCE = 1e-4
ONE = np.ones((), np.float32)
# Fast tests use only the odd size, which shows a wrong padding.
PAIRS = [
    *(
        pytest.param(*pair, slice(-1, None), id="-".join(pair))
        for pair in REFERENCES
        if pair in FAST
    ),
    *(
        pytest.param(*pair, slice(None), id="-".join((*pair, "all")), marks=pytest.mark.slow)
        for pair in REFERENCES
    ),
]
# Their gradients take up to 18 GB. They differ from resnetv2_50x1_bit in depth and width alone.
LARGE = {f"resnetv2_{size}_bit" for size in ("50x3", "101x3", "152x2", "152x4")}
NAMES = [  # larger networks differ from these in depth and width alone
    pytest.param(name, marks=[] if name == "resnet18" else pytest.mark.slow)
    for name in MODELS
    if name not in LARGE and any((name, layout) in REFERENCES for layout in LAYOUTS[name])
]


def images_for(model: Model) -> np.ndarray:
    """Return small images, for tokens of whole patches."""
    if patch := max(stage.patch_size for stage in model.stages):
        return random_images(2, 5 * patch, 5 * patch)
    return random_images(2, 97, 80)  # Inception needs at least 75 pixels


def test_every_model_and_layout_has_a_reference() -> None:
    expected = {(name, layout) for name in MODELS for layout in LAYOUTS[name]}
    assert not set(REFERENCES) & set(SHAPES)
    assert set(REFERENCES) | set(SHAPES) == {
        (name, layout) for name, layout in expected if not _is_alias(name, layout)
    }


def test_the_committed_table_is_complete() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "parity.json"
    pairs = json.loads(path.read_text("utf-8"))["pairs"]
    assert {(pair["model"], pair["layout"]) for pair in pairs} == set(REFERENCES)
    for pair in pairs:
        assert max(*pair["stages"].values(), pair["largest"]) <= TOLERANCE, pair
        # transformers resizes learned positions in another way, and pads EfficientNets in another;
        # torchvision does not resize them
        variant = vit.VARIANTS.get(pair["model"])
        if variant is None:
            any_size = pair["layout"] != "huggingface" or pair["model"] not in EFFICIENTNETS
            assert any(h != w and (h % 2 or not any_size) for h, w in pair["sizes"]), pair
        elif pair["layout"] not in ("huggingface", "torchvision") or variant.positions == "rotary":
            assert any(height != width for height, width in pair["sizes"]), pair


def _is_alias(name: str, layout: str) -> bool:
    """Return True if an earlier layout of the model has the same table."""
    first = next(key for key, table in LAYOUTS[name].items() if table is LAYOUTS[name][layout])
    return first != layout


@pytest.mark.parametrize(("name", "layout", "sizes"), PAIRS)
def test_every_stage_equals_the_reference(
    name: str, layout: str, sizes: slice, tmp_path: Path
) -> None:
    reference = REFERENCES[name, layout](tmp_path / "reference")
    reference = reference._replace(sizes=reference.sizes[sizes])
    pretrained = load_pretrained(reference.weights, model=name)
    assert (pretrained.model.name, pretrained.card.layout) == (name, layout)
    differences = stage_differences(pretrained, reference)
    jax.clear_caches()  # the programs of all networks do not fit the memory
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(*pair, id="-".join(pair), marks=pytest.mark.slow if i % 4 else ())
        for i, pair in enumerate(SHAPES)
    ],
)
def test_a_large_network_has_the_tensors_of_the_reference(name: str, layout: str) -> None:
    shapes = SHAPES[name, layout]()
    identity = identify({key: np.broadcast_to(ONE, shape) for key, shape in shapes.items()}, name)
    assert identity.layout == layout
    assert not any(identity.difference), str(identity.difference)


@pytest.fixture(scope="module", params=NAMES)
def network(request: pytest.FixtureRequest) -> Iterator[tuple[Model, Variables]]:
    model = build_model(request.param, 7)
    yield model, random_variables(model)
    jax.clear_caches()


def test_two_parts_of_a_network_equal_the_whole(network: tuple[Model, Variables]) -> None:
    model, variables = network
    run = jax.jit(partial(apply, model), static_argnames=("start", "stop", "capture"))
    x = images_for(model)
    whole = run(variables, x, capture=model.stage_names)
    for stage, following in zip(model.stage_names, (*model.stage_names[1:], None), strict=True):
        start = None if stage == model.stage_names[0] else stage
        x = run(variables, x, start=start, stop=following).value
        assert difference(x, whole.captured[stage]) <= 1e-6, stage
    assert difference(x, whole.logits) <= 1e-6


@pytest.mark.slow
def test_gradients_are_finite(network: tuple[Model, Variables]) -> None:
    """Training mode; every stage with parameters has gradients that are not zero."""
    model, variables = network
    images = images_for(model)
    weights = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradients(params: Variables, statistics: Variables) -> jax.Array:
        everything, key = set(model.stage_names), jax.random.key(0)
        mixed = {"params": params, "batch_stats": statistics}
        switches = {"batch_statistics": everything, "noise": everything}
        return (apply(model, mixed, images, **switches, key=key).logits * weights).sum()

    by_stage = gradients(variables["params"], variables["batch_stats"])
    for stage, tree in by_stage.items():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        assert all(np.isfinite(leaf).all() for leaf in leaves), stage
        assert any(leaf.any() for leaf in leaves), stage


@pytest.mark.slow
def test_both_modes_of_differentiation_agree_and_attacks_and_grad_cam_run(
    network: tuple[Model, Variables],
) -> None:
    model, variables = network
    images = images_for(model).astype(np.float32) / 255
    labels = np.array([1, 5])
    stage = grad_cam_stage(model)
    run = jax.jit(partial(apply, model), static_argnames=("start", "stop"))
    if np.abs(run(variables, images).logits).max() > 1e5:
        # Each block of a deep residual network adds to its input. With smaller norms, activations
        # do not grow so much that float32 loses the differences which are compared here.
        flat = flatten(variables)
        norms = {path: 0.7 * x for path, x in flat.items() if path.endswith("/scale")}
        variables = unflatten(flat | norms)

    def logits_fn(x: jax.Array) -> jax.Array:
        return run(variables, x).logits

    @jax.jit
    def products(
        variables: Variables, x: jax.Array, tangent: jax.Array, cotangent: jax.Array
    ) -> list[jax.Array]:
        _, forward = jax.jvp(lambda x: run(variables, x).logits, (x,), (tangent,))
        _, pull = jax.vjp(lambda x: run(variables, x).logits, x)
        scale = jnp.linalg.norm(forward) * jnp.linalg.norm(cotangent)
        return [(forward * cotangent).sum(), (tangent * pull(cotangent)[0]).sum(), scale]

    rng = np.random.default_rng(0)
    tangent, cotangent = (
        rng.standard_normal(x.shape, np.float32) for x in (images, logits_fn(images))
    )
    forward, reverse, scale = products(variables, images, tangent, cotangent)
    assert abs(forward - reverse) <= 1e-4 * scale

    attacked = fgsm(logits_fn, images, labels, jax.random.key(0), epsilon=4 / 255)
    change = np.abs(np.asarray(attacked) - images)
    assert 0 < change.max() <= 4 / 255 + 1e-6

    regions = grad_cam(
        lambda x: run(variables, x, stop=model.position(stage) + 1).value,
        lambda x: run(variables, x, start=model.position(stage) + 1).logits,
        images,
        labels,
        as_map=lambda x: feature_map(model, stage, x, images.shape),
    )
    assert regions.ndim == 3
    assert np.isfinite(regions).all()
    assert np.min(regions) >= 0
