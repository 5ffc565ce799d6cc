"""Models as lists of named stages, and `apply`, which runs any contiguous part of one."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Num, PRNGKeyArray

from tljax.models.layers import (
    INFERENCE,
    LAYERS,
    GlobalAveragePool,
    LinearHead,
    Mode,
    SimilarityHead,
    StochasticDepth,
)
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten
from tljax.runtime.types import Array, Variables


class Stage(NamedTuple):
    """Named stage of a model.

    Attributes:
        name: unique name in the model.
        module: Flax module called as ``module(x, mode)``; see `Mode`.
        output: kind of output: ``map`` ``[batch, height, width, channels]``, ``tokens``
            ``[batch, tokens, channels]`` or ``vector`` ``[batch, channels]``.
        prefix_tokens: number of output tokens before those of the image patches.
        patch_size: side in pixels of the patch that an output token stands for; 0 for maps and
            vectors.
    """

    name: str
    module: nn.Module
    output: Literal["map", "tokens", "vector"] = "map"
    prefix_tokens: int = 0
    patch_size: int = 0


@dataclass(frozen=True)
class Model:
    """Architecture: an ordered list of stages, and preprocessing. Contains no arrays.

    A model is hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        name: name of the architecture in `MODELS`, e.g. ``resnet50``.
        stages: stages from pixels to logits. The last one is the head, whatever its name; the head
            of a backbone has ``num_classes=0`` and returns the features.
        preprocess: preprocessing that the weights expect; see `Preprocess`.
        dtype: dtype of the activations. Parameters, statistics and logits are float32.
        drop_path: rate of stochastic depth in the last block where noise is enabled, in [0, 1). It
            decreases to 0 in the first block. Only networks of today have stochastic depth.
    """

    name: str
    stages: tuple[Stage, ...]
    preprocess: Preprocess
    dtype: str = "float32"
    drop_path: float = 0.0

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Return the names of the stages, in order."""
        return tuple(stage.name for stage in self.stages)

    @property
    def num_classes(self) -> int:
        """Return the number of outputs of the head, or 0 for a backbone without a head."""
        head = self.stages[-1].module
        if isinstance(head, LinearHead):
            return head.num_classes
        return self.num_outputs

    @property
    def num_outputs(self) -> int:
        """Return the number of outputs per image: logits, or the features of a backbone."""
        return _trace(self, self.stages)[1].shape[-1]

    @property
    def has_linear_head(self) -> bool:
        """Return True if the last stage is a linear function with ``kernel`` and ``bias``."""
        head = self.stages[-1].module
        return type(head) is LinearHead and head.num_classes > 0

    @property
    def map_stages(self) -> tuple[str, ...]:
        """Return the names of the stages whose output is a feature map, in order."""
        return tuple(stage.name for stage in self.stages if stage.output == "map")

    @property
    def spatial_stages(self) -> tuple[str, ...]:
        """Return the names of the stages whose output is a feature map, or tokens of patches."""
        return tuple(x.name for x in self.stages if x.output == "map" or x.patch_size)

    def grid(self, shape: Sequence[int], start: str | int | None = None) -> tuple[int, int] | None:
        """Return the rows and columns of the patches that tokens stand for.

        Args:
            shape: shape of the images or, with ``start``, of the output of the stage before it.
            start: first stage that runs. Tokens alone do not tell rows from columns: the images
                are taken for square.

        Returns:
            None if the network has no tokens, or if their number is no square.
        """
        first = 0 if start is None else self.position(start)
        if first == 0:
            size = max((stage.patch_size for stage in self.stages), default=0)
            return (shape[1] // size, shape[2] // size) if size else None
        before = self.stages[first - 1]
        tokens = shape[1] - before.prefix_tokens if before.output == "tokens" else 0
        side = math.isqrt(tokens)
        return (side, side) if tokens and side * side == tokens else None

    def position(self, stage: str | int) -> int:
        """Return the index of a stage.

        Args:
            stage: name or index; negative indices count from the end.

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
    """Result of `apply`.

    Attributes:
        value: output of the last stage that ran: logits, pooled features or a feature map.
        captured: outputs of the stages in ``capture``, by name.
        batch_stats: running statistics, updated for the stages in ``batch_statistics``.
    """

    value: Float[jax.Array, "batch ..."]
    captured: dict[str, Float[jax.Array, "batch ..."]]
    batch_stats: Variables

    @property
    def logits(self) -> Float[jax.Array, "batch classes"]:
        """Return `value`, which is the logits if the head was the last stage to run."""
        return self.value


StageFunction = Callable[[Variables, jax.Array], tuple[jax.Array, Variables]]
"""``(variables, x) -> (output, updated)``: a stage with its own variables. ``updated`` holds its
updated running statistics, if there are any."""

AroundStage = Callable[[StageFunction], StageFunction]
"""Transformation of the function of every stage, such as `jax.checkpoint`."""


def normalize(
    images: Num[Array, "batch height width channels"],
    preprocess: Preprocess,
    dtype: str = "float32",
) -> Float[jax.Array, "batch height width channels"]:
    """Normalize images to the model's input.

    Args:
        images: ``[batch, height, width, channels]``; uint8 in [0, 255], or floating point, which is
            in [0, 1] for images of 8 or 16 bits.
        preprocess: mean, standard deviation and channel order.
        dtype: dtype of the result.

    Raises:
        RequestError: the images have another number of channels than the preprocessing.
    """
    images = jnp.asarray(images)
    if images.shape[-1] != preprocess.channels:
        raise RequestError(
            f"images of shape {list(images.shape)} have {images.shape[-1]} channels: the network "
            f"needs {preprocess.channels}"
        )
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 255
    images = (images - jnp.asarray(preprocess.mean)) / jnp.asarray(preprocess.std)
    if preprocess.channel_order == "bgr":
        images = images[..., ::-1]
    return images.astype(dtype)


def apply(
    model: Model,
    variables: Variables,
    images: Num[Array, "batch ..."],
    *,
    start: str | int | None = None,
    stop: str | int | None = None,
    batch_statistics: Collection[str] = (),
    noise: Collection[str] = (),
    capture: Collection[str] = (),
    key: PRNGKeyArray | None = None,
    mask: Bool[Array, " batch"] | None = None,
    around_stage: AroundStage | None = None,
) -> Output:
    """Run the stages from ``start`` up to, but not including, ``stop``. A pure function.

    ``apply(stop=k)`` followed by ``apply(start=k)`` on its value is the whole network; ``stop=-1``,
    before the head, returns the pooled features.

    Args:
        model: stages and preprocessing.
        variables: ``{"params": {stage: ...}, "batch_stats": {stage: ...}}``; must contain the
            stages that run.
        images: ``[batch, height, width, channels]``, RGB for three channels, uint8 in [0, 255] or
            floating point, see `normalize`; with ``start``, the output of the previous stage.
        start: first stage to run, by name or index. By default the images are normalized and all
            stages run.
        stop: stage to stop before, by name or index; by default all remaining stages run.
        batch_statistics: stages whose batch norms use the statistics of the batch and update the
            running ones; by default none.
        noise: stages with dropout and stochastic depth enabled; by default none.
        capture: stages whose outputs are returned in ``Output.captured``; by default none.
        key: random key, required by ``noise``.
        mask: ``[batch]`` bool, the examples that contribute to batch statistics; by default all.
            The inputs of the other examples are replaced by zeros.
        around_stage: transformation of the function of every stage; with `jax.checkpoint`, only the
            outputs of stages are kept for the backward pass.

    Raises:
        RequestError: the model has no stage of a given name or index.
    """
    first = 0 if start is None else model.position(start)
    last = len(model.stages) if stop is None else model.position(stop)
    for name in (*batch_statistics, *noise, *capture):
        model.position(name)

    x: Any = jnp.asarray(images)  # Any: what a Flax module returns depends on `mutable`
    grid = model.grid(x.shape, first)
    x = normalize(x, model.preprocess, model.dtype) if first == 0 else x.astype(model.dtype)
    if mask is not None:
        x = jnp.where(jnp.expand_dims(mask, range(1, x.ndim)), x, 0)
    captured: dict[str, jax.Array] = {}
    batch_stats = dict(variables.get("batch_stats", {}))
    for position, (name, module, *_) in enumerate(model.stages[first:last], start=first):
        examples = name in batch_statistics and (True if mask is None else jnp.asarray(mask))
        mode = Mode(examples, name in noise, model.drop_path, grid)
        rngs = (
            {"dropout": jax.random.fold_in(key, position)} if mode.noise and key is not None else {}
        )
        run = partial(_run_stage, module, mode, rngs)
        x, updated = (around_stage(run) if around_stage else run)(_select(variables, name), x)
        if updated:
            batch_stats[name] = updated["batch_stats"]
        if name in capture:
            captured[name] = x
    return Output(x, captured, batch_stats)


def _run_stage(
    module: nn.Module, mode: Mode, rngs: dict[str, jax.Array], variables: Variables, x: jax.Array
) -> tuple[Any, Any]:
    if mode.batch_statistics is False:
        return module.apply(variables, x, mode, rngs=rngs), {}
    return module.apply(variables, x, mode, mutable=["batch_stats"], rngs=rngs)


def _select(variables: Variables, name: str) -> Variables:
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def init(model: Model, key: PRNGKeyArray) -> Variables:
    """Initialize the variables of every stage at random, in float32.

    Kernels are drawn from He's normal distribution (He et al. 2015, arXiv 1502.01852); the head is
    zero. Running means are 0, variances 1 and biases 0.

    Returns:
        ``{"params": {stage: ...}, "batch_stats": {stage: ...}}``.
    """
    # Under jit the activations are not computed, because the result does not depend on them.
    return jax.jit(lambda key: _build(model, key)[0])(key)


def _build(model: Model, key: jax.Array) -> tuple[Variables, jax.Array]:
    """Return random variables and the output for an image of zeros."""
    x = jnp.zeros((1, *model.preprocess.shape))
    mode = INFERENCE._replace(grid=model.grid(x.shape))
    variables: Variables = {"params": {}, "batch_stats": {}}
    for position, (name, module, *_) in enumerate(model.stages):
        x, trees = module.init_with_output(jax.random.fold_in(key, position), x, mode)
        for kind, tree in trees.items():
            variables[kind][name] = tree
    return variables, x


def abstract_variables(model: Model) -> Variables:
    """Return the shapes and dtypes of all variables, as a tree of `jax.ShapeDtypeStruct`."""
    *body, (name, head, *_) = model.stages
    shapes, features = _trace(model, body)
    trees = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, INFERENCE), features)
    return {**shapes, **{kind: {**shapes[kind], name: tree} for kind, tree in trees.items()}}


def abstract_images(model: Model, rows: int = 1) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a batch of images that the preprocessing returns."""
    return jax.ShapeDtypeStruct((rows, *model.preprocess.shape), model.preprocess.dtype)


def abstract_activations(
    model: Model, variables: Variables, stop: str | int | None, rows: int = 1
) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of what the stages before ``stop`` compute from a batch.

    Args:
        model: the network.
        variables: its variables; shapes are enough.
        stop: stage to stop before, by name or index; None runs all stages.
        rows: number of images.
    """
    value = jax.eval_shape(
        lambda v, x: apply(model, v, x, stop=stop).value, variables, abstract_images(model, rows)
    )
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def abstract_outputs(
    model: Model, variables: Variables, stages: Collection[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of the outputs of some stages for one image, by stage."""
    return jax.eval_shape(
        lambda v, x: apply(model, v, x, capture=stages).captured, variables, abstract_images(model)
    )


def _trace(model: Model, stages: Sequence[Stage]) -> tuple[Variables, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of the variables of some first stages, and of their output."""
    size, _, channels = model.preprocess.shape
    preprocess = Preprocess(size=size, mean=(0.0,) * channels, std=(1.0,) * channels)
    traced = _trace_cached(Model("", tuple(stages), preprocess))
    return jax.tree.map(lambda leaf: leaf, traced)  # a copy, which the caller may change


@lru_cache(maxsize=128)
def _trace_cached(model: Model) -> tuple[Variables, jax.ShapeDtypeStruct]:
    """Cache the shapes, because tracing takes a second; all heads of a backbone share them."""
    return jax.eval_shape(partial(_build, model), jax.random.key(0))


def stochastic_depth_stages(model: Model) -> frozenset[str]:
    """Return the names of the stages that drop residual branches if ``drop_path`` is above 0."""
    found: set[str] = set()

    def visit(stage: str, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, StochasticDepth) and context.module.depth:
            found.add(stage)
        return method(*args, **kwargs)

    def trace(variables: Variables, x: Any) -> None:
        mode = INFERENCE._replace(grid=model.grid(x.shape))
        for name, module, *_ in model.stages:
            with nn.intercept_methods(partial(visit, name)):
                x = module.apply(_select(variables, name), x, mode)

    size = model.preprocess.size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    jax.eval_shape(trace, abstract_variables(model), images)
    return frozenset(found)


def pooled_classifier(
    name: str, stages: Iterable[Stage], num_classes: int, preprocess: Preprocess
) -> Model:
    """Create a model from ``stages`` followed by global average pooling and a linear head."""
    pool = Stage("pool", GlobalAveragePool(), "vector")
    head = Stage("head", LinearHead(num_classes), "vector")
    return Model(name, (*stages, pool, head), preprocess)


def with_head(
    model: Model, num_classes: int, *, after: str | None = None, dropout: float = 0.0
) -> Model:
    """Return a model with a new linear head; see `replace_head` for the arguments.

    Global average pooling is inserted if the output of the stage before the head is not a vector.

    Raises:
        RequestError: there is no stage ``after``, or it is the head.
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
    """Replace the head by a new linear head, initialized to zero.

    Args:
        model: model whose last stage is replaced.
        variables: variables of ``model``; not modified.
        num_classes: number of classes of the new head; 0 returns the features (a backbone).
        after: name of the stage that the new head follows; later stages are removed, and maps and
            tokens are averaged. By default the stage before the old head.
        dropout: dropout rate before the new head, in [0, 1).

    Returns:
        The new model and its variables.

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


def add_similarity_head(
    model: Model,
    variables: Variables,
    vectors: Float[Array, "classes channels"],
    *,
    scale: float,
    bias: float = 0.0,
) -> tuple[Model, Variables]:
    """Append a head that compares the outputs of a network with one vector per class.

    The logit of a class is ``scale`` times the cosine between them, plus ``bias``. This is how CLIP
    (Radford et al. 2021, arXiv 2103.00020) and SigLIP classify with the embeddings of sentences.

    Args:
        model: network that returns ``[batch, channels]``.
        variables: variables of ``model``; not modified.
        vectors: one vector of any length per class.
        scale: factor of the cosines; positive.
        bias: what is added to every logit.

    Returns:
        The new model and its variables. A backbone's head, which has no parameters, is replaced.
    """
    *body, last = model.stages
    is_backbone = isinstance(last.module, LinearHead) and not last.module.num_classes
    kept, name = (body, last.name) if is_backbone else (model.stages, "similarity")
    kernel = scale * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    head = {
        "kernel": np.ascontiguousarray(kernel.T, np.float32),
        "bias": np.full(len(vectors), bias, np.float32),
    }
    stage = Stage(name, SimilarityHead(len(vectors)), "vector")
    variables = {**variables, "params": {**variables["params"], name: head}}
    return replace(model, stages=(*kept, stage)), variables


def select_outputs(
    model: Model, variables: Variables, indices: Sequence[int]
) -> tuple[Model, Variables]:
    """Return a network with some outputs of its head, in the order of ``indices``."""
    *body, last = model.stages
    assert isinstance(last.module, LinearHead)
    head = {name: leaf[..., list(indices)] for name, leaf in variables["params"][last.name].items()}
    stage = last._replace(module=last.module.clone(num_classes=len(indices)))
    variables = {**variables, "params": {**variables["params"], last.name: head}}
    return replace(model, stages=(*body, stage)), variables


@partial(jax.jit, static_argnames="model")
def layer_outputs(
    model: Model, variables: Variables, images: Num[Array, "batch height width channels"]
) -> OrderedDict[str, Float[jax.Array, "batch ..."]]:
    """Return the outputs of all layers, to compare a port with its source layer by layer.

    Args:
        model: stages and preprocessing.
        variables: variables of all stages.
        images: ``[batch, height, width, channels]``; uint8 in [0, 255] or floating point.

    Returns:
        The output of each convolution (after its norm), norm, dense layer and head, before the
        activation, by path and in the order of the network.
    """
    layers = (*LAYERS, LinearHead) if model.num_classes else LAYERS
    x: Any = normalize(images, model.preprocess, model.dtype)
    mode = INFERENCE._replace(grid=model.grid(x.shape))
    outputs = OrderedDict[str, jax.Array]()  # jit sorts the keys of a plain dict
    for name, module, *_ in model.stages:
        x, state = module.apply(
            _select(variables, name),
            x,
            mode,
            capture_intermediates=lambda m, _: isinstance(m, layers),
            mutable=["intermediates"],
        )
        for path, values in flatten(state.get("intermediates") or {}).items():
            outputs[f"{name}/{path}".removesuffix("/__call__")] = values[0]
    return outputs
