"""The programs that commands run, to compile them for a machine that need not be at hand.

They are the same jitted functions with the same shapes and shardings as on that machine: arrays are
described by `jax.ShapeDtypeStruct`, and no image is read but those that measure the loader.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tljax.attack import ensemble
from tljax.attack.contract import Attack
from tljax.attack.evaluate import trace_attack
from tljax.data.augment import epoch_key
from tljax.data.examples import Source, Splits
from tljax.data.loader import load_batches
from tljax.data.options import Loading
from tljax.features.extract import trace_forward
from tljax.features.logistic import trace_solver
from tljax.models import Model, abstract_activations, abstract_images
from tljax.pretrained import Pretrained
from tljax.runtime.parallel import fsdp_sharding, round_up_to_devices
from tljax.runtime.settings import Dtype
from tljax.runtime.types import Batch, Variables
from tljax.studies.rehearse import Program
from tljax.studies.robustness import is_ensemble, logits_fn
from tljax.train.adversary import trace_robust_logits
from tljax.train.feed import Rows, holding, repeated, steps_at_most
from tljax.train.freeze import first_trainable_stage, join, split
from tljax.train.inputs import Inputs, cache_bytes, cache_location, cached_dtype
from tljax.train.recipes import Phase
from tljax.train.setup import Run, phase_optimizer, phase_state, phase_step, phase_variables
from tljax.train.step import TrainState

Loader = Callable[[], Iterator[Batch]]


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Describe arrays that every device holds as a whole."""
    return _placed(tree, lambda _: NamedSharding(mesh, PartitionSpec()))


def divided(tree: Any, mesh: Mesh) -> Any:
    """Describe arrays whose first axis is divided over the devices."""
    return _placed(tree, lambda _: NamedSharding(mesh, PartitionSpec("data")))


def _placed(tree: Any, sharding: Callable[[tuple[int, ...]], NamedSharding]) -> Any:
    shapes = jax.eval_shape(lambda: tree) if not _is_abstract(tree) else tree
    return jax.tree.map(lambda x: x.update(sharding=sharding(x.shape)), shapes)


def _is_abstract(tree: Any) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def with_rows(tree: Any, rows: int) -> Any:
    """Describe arrays as those given, with another number of rows."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), tree)


def forward_program(
    name: str,
    model: Model,
    variables: Variables,
    mesh: Mesh,
    batch_size: int,
    *,
    start: str | None = None,
    stop: str | int | None = None,
    dtype: Dtype = "float32",
    loader: Loader | None = None,
) -> Program:
    """Return the program of evaluation, extraction, and validation: the stages up to ``stop``.

    Args:
        name: what it computes.
        model: the network.
        variables: its variables, or their shapes.
        mesh: the devices.
        batch_size: number of images over all devices; rounded up to a multiple of their number.
        start: first stage to run, which activations enter; None for images.
        stop: stage to stop before; None runs all stages.
        dtype: dtype of the result.
        loader: returns batches of images on the host.
    """
    image = abstract_images(model)
    if start is not None:
        image = abstract_activations(model, variables, start)

    def trace(batch: int) -> jax.stages.Traced:
        inputs = divided(with_rows(image, batch), mesh)
        where = {"start": start, "stop": stop, "dtype": dtype}
        return trace_forward(model, mesh, replicated(variables, mesh), inputs, **where)

    size = round_up_to_devices(batch_size, mesh)
    return Program(name, trace, size, mesh.size, cast("Dtype", model.dtype), loader)


def image_loader(model: Model, source: Source, loading: Loading) -> Loader:
    """Return what starts to load the images of a source, as evaluation and extraction do."""
    size = min(_LOADED, len(source))
    return lambda: load_batches(source, model.preprocess, batch_size=size, workers=loading.workers)


_LOADED = 32
"""Batch size that loading is measured with: small, as few large ones could all be loaded ahead."""


def attack_programs(
    network: Pretrained,
    attacks: Mapping[str, Attack],
    epsilon: float,
    mesh: Mesh,
    batch_size: int,
) -> list[Program]:
    """Return the programs in which `tljax.attack.evaluate` attacks a batch, one for each attack.

    Args:
        network: the network.
        attacks: attacks of `tljax.studies.robustness.choose_attacks`.
        epsilon: radius of the perturbation, for images in [0, 1].
        mesh: the devices.
        batch_size: number of images over all devices; rounded up to a multiple of their number.
    """
    model = network.model
    single: dict[str, Attack] = {}
    for name, attack in attacks.items():
        options = getattr(attack, "keywords", {})
        single |= ensemble(model.num_classes, **options) if is_ensemble(attack) else {name: attack}
    function = replicated(logits_fn(network), mesh)
    image = abstract_images(model)
    label = jax.ShapeDtypeStruct((1,), np.int32)
    key = replicated(jax.random.key(0), mesh)

    def trace(attack: Attack, batch: int) -> jax.stages.Traced:
        images, labels = divided(with_rows((image, label), batch), mesh)
        return trace_attack(attack, function, images, labels, key, epsilon)

    size = round_up_to_devices(batch_size, mesh)
    dtype = cast("Dtype", model.dtype)
    return [
        Program(name, partial(trace, attack), size, mesh.size, dtype)
        for name, attack in single.items()
    ]


def training_programs(run: Run, batch_size: int, memory: float) -> list[Program]:
    """Return the programs of a run of training.

    They are those of the probe that a recipe starts with; for each phase the computation of the
    activations that are cached, the step, and validation; the latter also under attack, where
    training is adversarial.

    Args:
        run: the run, on the mesh of the machine; see `tljax.train.setup.plan_run`.
        batch_size: number of images of a step over all devices; rounded up to a multiple.
        memory: bytes of memory of a device.
    """
    model, mesh = run.model, run.mesh
    variables = _validated(run)
    forward = partial(forward_program, model=model, variables=variables, mesh=mesh)
    forward = partial(forward, batch_size=batch_size)
    val_loader = image_loader(model, run.splits.val, run.loading)
    measured = replace(run.loading, batch_size=min(_LOADED, run.loading.batch_size))
    inputs = Inputs(run.splits, run.config, measured, run.seed, None, (), None, ({}, {}))
    programs: list[Program] = []
    if run.plan.start == "probe":
        head, source = model.stage_names[-1], run.splits.train
        programs.append(forward("features of the probe", stop=head, loader=val_loader))
        programs += _solvers(model, run.variables, source, mesh, head)
    for phase in run.plan.phases:
        start = first_trainable_stage(model, phase.rates)
        place = cache_location(model, run.splits, run.config, start)
        cached = None if place == "none" else start
        if cached:
            size = cache_bytes(model, run.splits, run.config, start) / 2**20
            name = f"activations that enter {start}, cached in {place}, {size:,.0f} MiB"
            dtype = cached_dtype(model, run.config, start)
            programs.append(forward(name, stop=start, dtype=dtype, loader=val_loader))
        programs += _step_programs(run, phase, inputs, cached, batch_size, memory)
        if cached:
            programs.append(forward(f"validation from {start}", start=cached))
        elif not any(program.name == "validation" for program in programs):
            programs.append(forward("validation", loader=val_loader))
    if run.config.attacker is not None:
        programs.append(_robust_program(run, batch_size))
    return programs


def _validated(run: Run) -> Variables:
    """Describe the variables of validation: those of the whole network, adapters merged."""
    rates = run.plan.phases[-1].rates if run.plan.phases else None
    if rates is None:
        return run.variables
    return jax.eval_shape(lambda v: join(*split(v, rates, ()), run.materialize), run.variables)


def _step_programs(
    run: Run, phase: Phase, inputs: Inputs, start: str | None, batch_size: int, memory: float
) -> list[Program]:
    """Return the training step of a phase, and several steps in one dispatch if a run has them."""
    model, mesh, config = run.model, run.mesh, run.config
    optimizer = phase_optimizer(run, phase, run.schedule(phase))
    step: Any = phase_step(run, phase, optimizer, start)

    def begin(variables: Variables) -> tuple[TrainState, Variables]:
        changing, frozen = phase_variables(run, phase, variables)
        return phase_state(run, changing, optimizer), frozen

    described = jax.eval_shape(begin, run.variables)
    if config.fsdp:
        state, frozen = _placed(described, lambda shape: fsdp_sharding(shape, mesh))
    else:
        state, frozen = replicated(described, mesh)
    keys = replicated((epoch_key(0, 0), jax.random.key(0)), mesh)
    loader = None
    if start is None:
        loader = partial(inputs.batches, model, epoch=1)
        example = next(loader())  # may hold whole photographs and the boxes to crop
    else:
        entered = abstract_activations(model, run.variables, start)
        entered = entered.update(dtype=jax.numpy.dtype(cached_dtype(model, config, start)))
        example = _one_row(run.splits.train, entered)

    def trace(batch: int) -> jax.stages.Traced:
        return step.trace(state, frozen, divided(with_rows(example, batch), mesh), keys)

    multiple = mesh.size * config.accumulate
    size = -(-batch_size // multiple) * multiple
    name = f"step of phase {phase.name}"
    name += f", from cached activations at {start}" if start else ""
    one = Program(name, trace, size, multiple, cast("Dtype", model.dtype), loader)
    steps, cached = steps_at_most(run, start), example.inputs
    bytes_of_all = cached.size * cached.dtype.itemsize * len(run.splits.train)
    where = holding(bytes_of_all, mesh.size, memory)
    if steps == 1 or where == "host":
        return [one]
    loop: Any = repeated(step, steps, mesh, where)
    values = replicated(with_rows(cached, len(run.splits.train)), mesh)
    if where == "divided":
        values = divided(with_rows(values, round_up_to_devices(len(values), mesh)), mesh)
    num_steps = replicated(jax.ShapeDtypeStruct((), np.int32), mesh)
    numbered = example._replace(inputs=jax.ShapeDtypeStruct((1,), np.int32))

    def trace_loop(batch: int) -> jax.stages.Traced:
        rows = with_rows(numbered, batch)
        rows = jax.tree.map(lambda x: x.update(shape=(steps, *x.shape)), rows)
        sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
        rows = _placed(rows, lambda _: sharding)
        return loop.trace(state, frozen, Rows(values, rows, num_steps), keys)

    part = "all" if where == "whole" else "a part of the"
    note = f"each chip holds {part} activations; speed and collectives are those of one step"
    name += f", {steps} in one dispatch"
    return [one, replace(one, name=name, trace=trace_loop, note=note)]


def _one_row(source: Source, inputs: jax.ShapeDtypeStruct) -> Batch:
    """Describe a batch of inputs, with the labels and mask that the source adds, by one row."""
    row = np.zeros(1, np.int32)
    return source.batch(cast("Any", inputs), row.astype(bool), row)


def _robust_program(run: Run, batch_size: int) -> Program:
    """Return the program of validation under attack."""
    model, mesh, config = run.model, run.mesh, run.config
    example = _one_row(run.splits.val, abstract_images(model))
    adversary = config.attacker
    assert adversary is not None
    variables, key = replicated((_validated(run), jax.random.key(0)), mesh)

    def trace(batch: int) -> jax.stages.Traced:
        rows = divided(with_rows(example, batch), mesh)
        return trace_robust_logits(model, adversary, variables, rows, key)

    size = round_up_to_devices(batch_size, mesh)
    return Program("validation under attack", trace, size, mesh.size, cast("Dtype", model.dtype))


def probe_programs(
    model: Model,
    variables: Variables,
    splits: Splits,
    mesh: Mesh,
    loading: Loading,
    *,
    stage: str = "head",
) -> list[Program]:
    """Return the programs of a probe: the features, and the solver on those of all images.

    Args:
        model: the network.
        variables: its variables, or their shapes.
        splits: the images.
        mesh: the devices.
        loading: batch size, and how images are read.
        stage: stage whose input is probed.
    """
    size, source = loading.batch_size, splits.train
    loader = image_loader(model, source, loading)
    features = forward_program("features", model, variables, mesh, size, stop=stage, loader=loader)
    return [features, *_solvers(model, variables, source, mesh, stage)]


def _solvers(
    model: Model, variables: Variables, source: Source, mesh: Mesh, stage: str
) -> list[Program]:
    """Return the solver of a probe of classes; those of other tasks are not rehearsed."""
    if source.task.kind != "classification":
        return []
    width = abstract_activations(model, variables, stage).shape[-1]
    return [solver_program(len(source), width, len(source.classes), mesh)]


def solver_program(examples: int, width: int, classes: int, mesh: Mesh) -> Program:
    """Return the program that solves a linear probe for one L2 value.

    Args:
        examples: number of images.
        width: number of features of each.
        classes: number of classes.
        mesh: the devices.
    """

    def trace(rows: int) -> jax.stages.Traced:
        return trace_solver(rows, width, classes, mesh)

    return Program(
        f"solver of the probe, {width} features and {classes} classes",
        trace,
        examples,
        1,
        varies=False,
        note="the duration is that of one iteration; an L2 value takes a few to a hundred",
    )
