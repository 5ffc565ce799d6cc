"""Serialization of models to JSON and back, including damaged and malicious JSON."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from flax.core import FrozenDict

from tljax.models import (
    MODELS,
    Model,
    Stage,
    abstract_variables,
    apply,
    build_model,
    replace_head,
    with_head,
)
from tljax.models.layers import ConvNorm, Dense, GlobalAveragePool, LinearHead, Mode
from tljax.models.spec import from_json, to_json
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import INCEPTION_PREPROCESS, Preprocess

QUICK = (
    *("resnet18", "keras_resnet50v2", "resnetv2_50x1_bit", "inception_v3", "keras_xception"),
    *("efficientnet_lite0", "vgg11", "tf_mobilenetv1_025", "mobilenetv2_050"),
    "mobilenetv3_small_050",
)
NAMES = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS]


class MLP(nn.Module):
    """Head with every kind of setting."""

    widths: tuple[int, ...]
    num_classes: int
    rate: float = 0.5
    bias: bool = True
    note: str | None = None
    norms: Any = FrozenDict()
    first: nn.Module | None = None
    activation: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        if self.first is not None:
            x = self.first(x)
        for width in self.widths:
            x = nn.relu(nn.Dense(width, use_bias=self.bias)(x))
        x = nn.Dropout(self.rate, deterministic=not mode.noise)(x)
        return nn.Dense(self.num_classes)(x)


class Tokens(nn.Module):
    """Stage that returns two prefix tokens and the pixels of the map as tokens."""

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        tokens = x.reshape(len(x), -1, x.shape[-1])
        return jnp.concatenate([jnp.full_like(tokens[:, :2], 1e3), tokens], 1)


OWN = {"MLP": MLP, "Unit": tiny.Unit, "Tokens": Tokens}


def through_json(model: Model, modules: Any = None) -> Model:
    return from_json(json.loads(json.dumps(to_json(model), allow_nan=False)), modules)


def custom_head(model: Model, **settings: Any) -> Model:
    head = Stage("classifier", MLP((4, 5), 3, **settings), "vector")
    return replace(model, stages=(*model.stages[:-1], head))


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_network_survives_the_round_trip(name: str) -> None:
    model = build_model(name, 7)
    assert through_json(model) == model
    last = to_json(model)["stages"][-1]
    assert (last["module"], last["settings"]["num_classes"]) == ("LinearHead", 7)


RESNET = build_model("resnet18")


@pytest.mark.parametrize(
    "model",
    [
        RESNET,
        with_head(RESNET, 0),
        with_head(RESNET, 3, after="layer2", dropout=0.25),
        with_head(build_model("vgg11"), 3, after="block2"),
        replace(
            RESNET,
            dtype="bfloat16",
            preprocess=replace(INCEPTION_PREPROCESS, size=64, channel_order="bgr"),
        ),
        replace(RESNET, name="mine", stages=tiny.MODEL.stages),
        tiny.MODEL,
        custom_head(RESNET),
        custom_head(tiny.MODEL, rate=0.0, bias=False, note="a 'note'\nin two lines"),
        custom_head(tiny.MODEL, norms=FrozenDict(a=(1, (2.5, None)), b=True), first=Dense(6)),
        custom_head(tiny.MODEL, norms=((), ("x",))),
        Model(
            "tokens",
            (
                Stage("stem", tiny.Unit(4, stride=4)),
                Stage("tokens", Tokens(), "tokens", prefix_tokens=2),
                Stage("pool", GlobalAveragePool(2), "vector"),
                Stage("answer", LinearHead(2), "vector"),
            ),
            Preprocess(16, 16),
        ),
    ],
    ids=lambda model: model.name,
)
def test_any_stages_survive_the_round_trip(model: Model) -> None:
    again = through_json(model, OWN)
    assert (again, hash(again)) == (model, hash(model))
    shapes = [jax.tree.map(jnp.shape, abstract_variables(each)) for each in (model, again)]
    assert shapes[0] == shapes[1]


def test_the_outputs_survive_the_round_trip() -> None:
    model = custom_head(tiny.MODEL, first=Dense(6))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(np.float32), abstract_variables(model)
    )
    images = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    expected = apply(model, variables, images).logits
    actual = apply(through_json(model, OWN), variables, images).logits
    np.testing.assert_array_equal(actual, expected)
    assert expected.shape == (2, model.num_classes)


# --- what cannot be written or read --------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        (lambda x: x, "function"),
        (np.ones(3), "ndarray"),
        (float("nan"), "float"),
        (jnp.float32, "_ScalarMeta"),
        (Preprocess(), "Preprocess"),
        ({1: 2}, "dict"),
        ([1, {"a": nn.relu}], "custom_jvp"),
    ],
)
def test_a_setting_that_is_not_a_plain_value_is_refused(setting: object, kind: str) -> None:
    expected = rf"^activation of stage classifier of tiny is a {kind}, which cannot be saved"
    with pytest.raises(RequestError, match=expected) as caught:
        to_json(custom_head(tiny.MODEL, activation=setting))
    assert "\n" not in str(caught.value)


def test_a_class_with_the_name_of_a_tljax_module_is_refused() -> None:
    with pytest.raises(RequestError, match="first of stage classifier of tiny is a Dense that is"):
        to_json(custom_head(tiny.MODEL, first=nn.Dense(3)))


def test_an_unknown_module_is_refused_and_never_imported() -> None:
    spec = to_json(custom_head(tiny.MODEL)) | {"name": "x"}
    with pytest.raises(RequestError, match=r"the module 'Unit'.*--extension FILE.py.*modules"):
        from_json(spec)
    spec["stages"][-1]["module"] = "os.system"
    with pytest.raises(RequestError, match=r"needs the module 'os.system'"):
        from_json(spec, OWN)


def test_a_later_version_is_refused() -> None:
    spec = to_json(RESNET)
    with pytest.raises(RequestError, match=r"in version 2, and this tljax reads version 1"):
        from_json(spec | {"version": 2})
    spec["stages"][0]["of"] = "vit_b16"
    with pytest.raises(RequestError, match="this tljax has no model 'vit_b16': upgrade it"):
        from_json(spec)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    spec = json.loads(json.dumps(to_json(custom_head(with_head(tiny.MODEL, 3)))))
    change(spec)
    return spec


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.clear(),
        lambda spec: spec.update(stages=[]),
        lambda spec: spec.update(stages=7),
        lambda spec: spec.update(stages=spec["stages"][:1] * 2),
        lambda spec: spec.update(name="a\nb"),
        lambda spec: spec.update(name=[]),
        lambda spec: spec.update(dtype="int8"),
        lambda spec: spec["preprocess"].update(mean="x"),
        lambda spec: spec["preprocess"].update(size=10**9, resize=10**9),
        lambda spec: spec["preprocess"].update(colour=1),
        lambda spec: spec["stages"][0].update(name="a/b"),
        lambda spec: spec["stages"][0].update(name=""),
        lambda spec: spec["stages"][0].update(of="resnet\n18"),
        lambda spec: spec["stages"][0].update(of=[]),
        lambda spec: spec["stages"][0].update(of="resnet18", name="layer9"),
        lambda spec: spec["stages"][0].update(module=["Unit"]),
        lambda spec: spec["stages"][0].pop("module"),
        lambda spec: spec["stages"][0].update(module="LinearHead"),
        lambda spec: spec["stages"][0].update(output="cube"),
        lambda spec: spec["stages"][0].update(prefix_tokens="2"),
        lambda spec: spec["stages"][0]["settings"].update(colour="blue"),
        lambda spec: spec["stages"][0]["settings"].update(parent="x"),
        lambda spec: spec["stages"][0]["settings"].update(features="many\nmore"),
        lambda spec: spec["stages"][0]["settings"].update(features=-8),
        lambda spec: spec["stages"][-1]["settings"].update(num_classes=None),
        lambda spec: spec["stages"][-1]["settings"].update(widths={"module": "MLP"}),
    ],
)
def test_damaged_json_is_refused_in_one_line(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(RequestError) as caught:
        from_json(changed(change), OWN)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["module", "settings", "of", "name", "x"]), inner)
    ),
    max_leaves=5,
)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_json_is_read_or_refused(data: st.DataObject) -> None:
    """Any value in any place raises nothing but `RequestError`."""
    root = changed(lambda _: None)
    parent: Any = root
    key: Any = data.draw(st.sampled_from(sorted(root)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
        key = data.draw(st.sampled_from(keys))
    parent[key] = data.draw(JSON)
    assert "\n" not in refusal(root)


def refusal(spec: object) -> str:
    try:
        from_json(spec, OWN)
    except RequestError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("spec", [None, 3, [], "{}", {"version": 1}, {"version": "1"}])
def test_other_values_are_refused(spec: object) -> None:
    with pytest.raises(RequestError):
        from_json(spec)


# --- outputs of stages ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_the_output_that_it_declares(name: str) -> None:
    model = build_model(name, 7)
    size = model.preprocess.size
    outputs = jax.eval_shape(
        lambda v, x: apply(model, v, x, capture=model.stage_names).captured,
        abstract_variables(model),
        jax.ShapeDtypeStruct((1, size, size, 3), np.uint8),
    )
    dimensions = {"map": 4, "tokens": 3, "vector": 2}
    for stage in model.stages:
        assert len(outputs[stage.name].shape) == dimensions[stage.output], stage.name
    assert model.map_stages == model.stage_names[: len(model.map_stages)]
    assert outputs[model.stage_names[-1]].shape == (1, model.num_classes)


def test_num_classes_is_the_number_of_outputs_of_the_head() -> None:
    model = custom_head(tiny.MODEL)
    assert (model.num_classes, model.has_linear_head) == (3, False)
    assert (tiny.MODEL.num_classes, tiny.MODEL.has_linear_head) == (3, True)
    backbone = with_head(tiny.MODEL, 0)
    assert (backbone.num_classes, backbone.has_linear_head) == (0, False)

    @jax.jit
    def inside(x: jax.Array) -> jax.Array:
        return x * custom_head(tiny.MODEL, rate=0.25).num_classes

    assert inside(jnp.ones(())) == 3


def test_a_new_head_averages_the_tokens_without_the_prefix() -> None:
    stages = (*tiny.MODEL.stages[:2], Stage("tokens", Tokens(), "tokens", prefix_tokens=2))
    model = Model("tokens", (*stages, Stage("head", LinearHead(3), "vector")), Preprocess(16, 16))
    variables = tiny.random_variables()
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    for after in ("tokens", None):
        new, replaced = replace_head(model, variables, 2, after=after)
        assert new.stages[-2] == Stage("pool", GlobalAveragePool(2), "vector")
        pooled = apply(tiny.MODEL, variables, images, stop=-1).value
        features = apply(new, replaced, images, stop=-1).value
        np.testing.assert_allclose(features, pooled, rtol=1e-5)


def test_a_stage_can_be_given_by_its_position() -> None:
    assert [tiny.MODEL.position(stage) for stage in (0, -1, "pool")] == [0, 3, 2]
    with pytest.raises(RequestError, match="tiny has no stage '4'"):
        tiny.MODEL.position(4)


def test_a_custom_module_may_contain_tljax_modules() -> None:
    class Wrap(nn.Module):
        inner: nn.Module

        def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
            return self.inner(x, mode)

    stem = Stage("stem", Wrap(ConvNorm(8, (3, 1), padding=((1, 1), (0, 0)))))
    model = replace(tiny.MODEL, stages=(stem, *tiny.MODEL.stages[1:]))
    assert through_json(model, {**OWN, "Wrap": Wrap}) == model
