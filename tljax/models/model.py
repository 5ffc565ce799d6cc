"""A network is a short list of named stages; `apply` runs any contiguous part of it."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.models.layers import INFERENCE, LAYERS, GlobalAveragePool, LinearHead, Mode
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.runtime.types import Array, Preprocess, Variables


class Stage(NamedTuple):
    """One named step of a network.

    Attributes:
        name: unique in its network.
        module: a Flax module called as ``module(x, mode)``; see `Mode`.
        output: the shape of what it hands on: ``map`` ``[batch, height, width, channels]``,
            ``tokens`` ``[batch, tokens, channels]`` or ``vector`` ``[batch, channels]``.
        prefix_tokens: how many tokens come before those of the image's patches.
    """

    name: str
    module: nn.Module
    output: Literal["map", "tokens", "vector"] = "map"
    prefix_tokens: int = 0


@dataclass(frozen=True)
class Model:
    """An ordered list of stages and the preprocessing that its weights expect. Holds no arrays.

    Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        name: what `MODELS` calls the architecture, e.g. ``resnet50``.
        stages: from the pixels to the logits; the last one is the head, whatever its name, which
            hands on the features where ``num_classes`` is 0: a backbone.
        preprocess: see `Preprocess`.
        dtype: compute dtype of the activations. Parameters, statistics and logits stay float32.
    """

    name: str
    stages: tuple[Stage, ...]
    preprocess: Preprocess
    dtype: str = "float32"

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, in order."""
        return tuple(stage.name for stage in self.stages)

    @property
    def num_classes(self) -> int:
        """How many numbers the head returns; 0 of a backbone, which has no head."""
        head = self.stages[-1].module
        if isinstance(head, LinearHead):
            return head.num_classes
        return _outline(self, self.stages)[1].shape[-1]

    @property
    def has_linear_head(self) -> bool:
        """Whether the last stage is a linear map, with parameters ``kernel`` and ``bias``."""
        head = self.stages[-1].module
        return isinstance(head, LinearHead) and head.num_classes > 0

    @property
    def map_stages(self) -> tuple[str, ...]:
        """The names of the stages that hand on a feature map, in order."""
        return tuple(stage.name for stage in self.stages if stage.output == "map")

    def position(self, stage: str | int) -> int:
        """Where a stage stands, by its name or a position, -1 for the last.

        Raises:
            RequestError: there is no such stage.
        """
        if isinstance(stage, int) and -len(self.stages) <= stage < len(self.stages):
            return stage % len(self.stages)
        if stage not in self.stage_names:
            known = ", ".join(self.stage_names)
            raise RequestError(f"{self.name} has no stage '{stage}'; its stages are {known}")
        return self.stage_names.index(stage)


class Output(NamedTuple):
    """What `apply` returns.

    Attributes:
        value: output of the last stage that ran: logits, pooled features or a feature map.
        captured: outputs of the stages named in ``capture``.
        batch_stats: the running statistics afterwards; new ones for the stages in
            ``batch_statistics``.
    """

    value: jax.Array
    captured: dict[str, jax.Array]
    batch_stats: Variables

    @property
    def logits(self) -> jax.Array:
        """`value`, by the name it has when the head was the last stage to run."""
        return self.value


def normalize(images: Array, preprocess: Preprocess, dtype: str = "float32") -> jax.Array:
    """The model's own normalisation of RGB images.

    Args:
        images: ``[batch, height, width, 3]``; uint8, or floating point in [0, 1].
        preprocess: mean, standard deviation and channel order.
        dtype: of the result.
    """
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 255
    images = (images - jnp.asarray(preprocess.mean)) / jnp.asarray(preprocess.std)
    if preprocess.channel_order == "bgr":
        images = images[..., ::-1]
    return images.astype(dtype)


def apply(
    model: Model,
    variables: Variables,
    images: Array,
    *,
    start: str | int | None = None,
    stop: str | int | None = None,
    batch_statistics: Collection[str] = (),
    noise: Collection[str] = (),
    capture: Collection[str] = (),
    key: jax.Array | None = None,
    mask: Array | None = None,
) -> Output:
    """Runs the stages from ``start`` up to, not including, ``stop``. A pure function.

    ``apply(stop=k)`` and then ``apply(start=k)`` on its value is the whole network; ``stop=-1``,
    before the head, gives the pooled features.

    Args:
        model: the list of stages.
        variables: ``{"params": {stage: ...}, "batch_stats": {stage: ...}}``; only the stages that
            run need be there.
        images: ``[batch, height, width, 3]`` RGB, uint8 or floating point in [0, 1]; with ``start``
            the output of the stage before it.
        start: first stage to run, by name or position; by default the first, which the
            normalisation precedes.
        stop: stage to stop before, by name or position; by default none.
        batch_statistics: stages whose batch norms use the statistics of the batch and move the
            running ones; by default none.
        noise: stages whose dropout and stochastic depth draw; by default none.
        capture: stages whose outputs are returned as well.
        key: random key; ``noise`` needs it.
        mask: ``[batch]`` bool, the rows that count in batch statistics; by default all. The others
            enter as zeros, whatever they hold.

    Raises:
        RequestError: a stage that the model does not have.
    """
    first = 0 if start is None else model.position(start)
    last = len(model.stages) if stop is None else model.position(stop)
    for name in (*batch_statistics, *noise, *capture):
        model.position(name)

    x: Any = jnp.asarray(images)  # Any: what a Flax module returns depends on `mutable`
    x = normalize(x, model.preprocess, model.dtype) if first == 0 else x.astype(model.dtype)
    if mask is not None:
        x = jnp.where(jnp.expand_dims(mask, range(1, x.ndim)), x, 0)
    captured: dict[str, jax.Array] = {}
    batch_stats = dict(variables.get("batch_stats", {}))
    for position, (name, module, *_) in enumerate(model.stages[first:last], start=first):
        of_stage = _of_stage(variables, name)
        rows = name in batch_statistics and (True if mask is None else jnp.asarray(mask))
        mode = Mode(rows, name in noise)
        rngs = (
            {"dropout": jax.random.fold_in(key, position)} if mode.noise and key is not None else {}
        )
        if rows is False:
            x = module.apply(of_stage, x, mode, rngs=rngs)
        else:
            x, moved = module.apply(of_stage, x, mode, mutable=["batch_stats"], rngs=rngs)
            if moved:
                batch_stats[name] = moved["batch_stats"]
        if name in capture:
            captured[name] = x
    return Output(x, captured, batch_stats)


def _of_stage(variables: Variables, name: str) -> Variables:
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def init(model: Model, key: jax.Array) -> Variables:
    """Random variables for every stage, float32.

    A convolution's kernel is drawn from He's normal distribution; the head is zero.
    """
    # jitted, so that the activations, which nothing returned depends on, are never computed
    return jax.jit(lambda key: _build(model, key)[0])(key)


def _build(model: Model, key: jax.Array) -> tuple[Variables, jax.Array]:
    """Random variables, and the output for an image of zeros."""
    x = jnp.zeros((1, model.preprocess.size, model.preprocess.size, 3))
    variables: Variables = {"params": {}, "batch_stats": {}}
    for position, (name, module, *_) in enumerate(model.stages):
        x, trees = module.init_with_output(jax.random.fold_in(key, position), x, INFERENCE)
        for kind, tree in trees.items():
            variables[kind][name] = tree
    return variables, x


def abstract_variables(model: Model) -> Variables:
    """The skeleton that weights are filled into: shapes and dtypes, no memory, no random draw."""
    *body, (name, head, *_) = model.stages
    skeleton, features = _outline(model, body)
    trees = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, INFERENCE), features)
    return {**skeleton, **{kind: {**skeleton[kind], name: tree} for kind, tree in trees.items()}}


def _outline(model: Model, stages: Sequence[Stage]) -> tuple[Variables, jax.ShapeDtypeStruct]:
    """The variables of the first stages of a model, and their output, as shapes and dtypes."""
    size = model.preprocess.size
    outline = _traced(Model("", tuple(stages), Preprocess(size=size)))
    return jax.tree.map(lambda leaf: leaf, outline)  # the caller's own


@lru_cache(maxsize=128)
def _traced(model: Model) -> tuple[Variables, jax.ShapeDtypeStruct]:
    """Kept, because it takes a second; the heads of one backbone share it."""
    return jax.eval_shape(partial(_build, model), jax.random.key(0))


def with_head(
    model: Model, num_classes: int, *, after: str | None = None, dropout: float = 0.0
) -> Model:
    """Return the same stages with another linear head, or with 0 classes none; see `replace_head`.

    What is not a vector is averaged before it.
    """
    *body, old = model.stages
    if after is not None:
        if after == old.name:
            raise RequestError(f"a new head replaces {after}; put it after an earlier stage")
        body = body[: model.position(after) + 1]
    if body and body[-1].output != "vector":
        body.append(Stage("pool", GlobalAveragePool(body[-1].prefix_tokens), "vector"))
    head = Stage(old.name, LinearHead(num_classes, dropout), "vector")
    return replace(model, stages=(*body, head))


def replace_head(
    model: Model,
    variables: Variables,
    num_classes: int,
    *,
    after: str | None = None,
    dropout: float = 0.0,
) -> tuple[Model, Variables]:
    """The same network with a new linear head, zero: every class equally likely.

    Args:
        model: any network; its last stage is replaced.
        variables: of ``model``; not changed.
        num_classes: number of logits of the new head; 0 for none: the features are handed on.
        after: the stage whose output the new head reads (maps and tokens are averaged first); the
            stages behind it are dropped. By default the one before the old head.
        dropout: rate before the new head, active where the head has ``noise``.

    Raises:
        RequestError: there is no stage ``after``, or it is the head.
    """
    new = with_head(model, num_classes, after=after, dropout=dropout)
    *body, head = new.stage_names
    trees = {
        kind: {name: tree for name, tree in stages.items() if name in body}
        for kind, stages in variables.items()
    }
    if num_classes:
        shapes = abstract_variables(new)["params"][head]
        trees["params"][head] = {name: jnp.zeros(leaf.shape) for name, leaf in shapes.items()}
    return new, trees


@partial(jax.jit, static_argnames="model")
def layer_outputs(model: Model, variables: Variables, images: Array) -> OrderedDict[str, jax.Array]:
    """The output of every convolution (with its norm), norm, dense layer and head, by its path.

    For comparing a port with its source layer by layer; an activation is not part of its layer.
    In the order of the network.
    """
    layers = (*LAYERS, LinearHead) if model.num_classes else LAYERS
    x: Any = normalize(images, model.preprocess, model.dtype)
    outputs = OrderedDict[str, jax.Array]()  # jit would sort the keys of a dictionary
    for name, module, *_ in model.stages:
        x, state = module.apply(
            _of_stage(variables, name),
            x,
            INFERENCE,
            capture_intermediates=lambda m, _: isinstance(m, layers),
            mutable=["intermediates"],
        )
        for path, values in flatten(state.get("intermediates") or {}).items():
            outputs[f"{name}/{path}".removesuffix("/__call__")] = values[0]
    return outputs
