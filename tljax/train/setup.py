"""Set up a run: the head, the plan of phases, the inputs, and the state and step of a phase."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tljax.data.augment import check_randaugment
from tljax.data.examples import Source, Splits
from tljax.data.loader import num_batches
from tljax.data.options import Loading
from tljax.features.evaluate import METRICS
from tljax.features.probe import Probe
from tljax.features.source_probe import fit_source_probe
from tljax.models import Model, init, replace_head
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import (
    Preemption,
    data_mesh,
    is_main_process,
    replicate,
    shard_parameters,
)
from tljax.runtime.settings import Conditions, find_unused_settings, settings
from tljax.runtime.task import Task
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables
from tljax.train.adapt import adapter_functions, add_adapter
from tljax.train.adversary import adversarial
from tljax.train.checkpoint import Checkpoints
from tljax.train.freeze import combine, first_trainable_stage, label, split, wholly_trained_stages
from tljax.train.history import History, default_choice
from tljax.train.inputs import Inputs, open_inputs
from tljax.train.memory import memory_options
from tljax.train.objectives import Objective, make_objective
from tljax.train.optimizer import OptimizerWrapper, build_optimizer, learning_rate_schedule
from tljax.train.options import REQUEST_CONDITIONS, FitConfig
from tljax.train.recipes import Phase, Plan, make_plan
from tljax.train.step import (
    Materialize,
    ParameterNoise,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    no_noise,
)

Tree = TypeVar("Tree")

_AGREE_EVERY = 64  # steps, where none are logged

NewHead = Callable[[Model, Variables, int], tuple[Model, Variables]]


@dataclass(frozen=True)
class Run:
    """Everything that is constant during a run.

    Attributes:
        plan: phases of the recipe for this network.
        model: network with a head for the classes of the data.
        variables: variables before training.
        probe: linear probe, whose weights are in the head; None for a recipe without a probe.
        splits: training and validation images.
        loading: options of how images are read; the batch size is at most the training set's size.
        seed: seed of the random number generator.
        mesh: devices.
        task: what is learned, with the mean and scale of numbers.
        parameter_noise: random change of the trainable parameters in every step.

    The other attributes are arguments of `tljax.train.fit.fit`.
    """

    plan: Plan
    model: Model
    variables: Variables
    probe: Probe | None
    splits: Splits
    loading: Loading
    seed: int
    mesh: Mesh
    task: Task
    objective: Objective
    materialize: Materialize = combine
    parameter_noise: ParameterNoise = no_noise
    transform: optax.GradientTransformation | OptimizerWrapper | None = None
    on_step: Callable[[int, dict[str, float]], None] | None = None
    log_every: int = 1
    on_epoch: Callable[[History], None] = lambda _: None
    checkpoints: Checkpoints | None = None
    checkpoint_seconds: float = 600
    profile: Path | None = None
    preemption: Preemption | None = None

    def report(self, history: History) -> None:
        """Call ``on_epoch`` with a copy of the history."""
        self.on_epoch([dict(entry) for entry in history])

    @property
    def config(self) -> FitConfig:
        """Return the configuration with all defaults filled in."""
        return self.plan.config

    @property
    def choose_by(self) -> str:
        """Return the metric by which the best epoch is chosen."""
        assert self.config.choose_by is not None  # `check_task` fills it in
        return self.config.choose_by

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of batches per epoch, including a smaller last one."""
        return num_batches(len(self.splits.train), self.loading.batch_size)

    @property
    def agree_every(self) -> int:
        """Return after how many steps processes agree on whether to save: the logged ones."""
        logged = self.log_every if self.on_step else _AGREE_EVERY
        return logged if jax.process_count() > 1 else 1

    def schedule(self, phase: Phase) -> optax.Schedule:
        """Return the learning rate as a function of the step of a phase."""
        return learning_rate_schedule(self.config.optimizer, phase.epochs * self.steps_per_epoch)

    def place(self, tree: Tree) -> Tree:
        """Copy variables or a training state to the devices: with ``fsdp`` sharded over them."""
        if self.config.fsdp:
            return shard_parameters(tree, self.mesh)
        return replicate(tree, self.mesh, copy=True)

    def open_inputs(self, start: str) -> Inputs:
        """Return the activations that enter ``start``, or the images if nothing is cached."""
        return open_inputs(
            self.model, self.variables, self.splits, self.config, self.loading, self.seed, start
        )


def prepare(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig | None = None,
    loading: Loading | None = None,
    seed: int = 0,
    new_head: NewHead | None = None,
    **run_options: Any,
) -> tuple[Run, Inputs]:
    """Set up a run up to its first step, including the probe.

    Args:
        model: pretrained network, with any head.
        variables: variables of ``model``.
        splits: training and validation images.
        config: what to train.
        loading: options of how images are read.
        seed: seed of the random number generator.
        new_head: see `tljax.train.fit.fit`.
        run_options: further attributes of `Run`.

    Returns:
        The run, and the inputs of its first phase.

    Raises:
        RequestError: the configuration does not fit the model or the data.
    """
    run = plan_run(model, variables, splits, config, loading, seed, new_head, **run_options)
    model, variables, phases = run.model, run.variables, run.plan.phases
    head = model.stage_names[-1]
    inputs = run.open_inputs(first_trainable_stage(model, phases[0].rates) if phases else head)
    if run.plan.start != "probe":
        return run, inputs
    features = inputs.pooled(model, variables)
    balance = run.config.balance
    probe = fit_source_probe(features, run.splits.train, run.task, balance=balance, seed=seed)
    probe_head = {"kernel": np.asarray(probe.kernel), "bias": np.asarray(probe.bias)}
    variables = {**variables, "params": {**variables["params"], head: probe_head}}
    return replace(run, variables=variables, probe=probe), inputs


def plan_run(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig | None = None,
    loading: Loading | None = None,
    seed: int = 0,
    new_head: NewHead | None = None,
    mesh: Mesh | None = None,
    **run_options: Any,
) -> Run:
    """Plan a run, without reading images or running the network.

    Args:
        model: see `prepare`, as for the following arguments and for errors.
        variables: variables of ``model``.
        splits: training and validation images.
        config: what to train.
        loading: options of how images are read.
        seed: seed of the random number generator.
        new_head: see `tljax.train.fit.fit`.
        mesh: devices to train on, by default those of this machine.
        run_options: further attributes of `Run`.
    """
    loading = loading or Loading()
    loading = replace(loading, batch_size=min(loading.batch_size, len(splits.train)))
    config = config or FitConfig()
    changed = {name for name, _ in settings(config).items() - settings(FitConfig()).items()}
    for note in (
        find_unused_settings(config, REQUEST_CONDITIONS, changed).values()
        if is_main_process()
        else ()
    ):
        print(f"note: {note}", file=sys.stderr)
    objective = run_options.get("objective")
    _check_replaced(config, changed, objective, new_head)
    _check_labels(splits)
    task = fitted_task(splits.train)
    config = check_task(config, task)
    check_images(model, config)
    if task.kind == "regression" and splits.train.targets is None:
        # On the host in float64: float32 cannot tell large numbers apart.
        targets = task.standardize(splits.train.labels).astype(np.float32)
        splits = splits._replace(train=replace(splits.train, targets=targets))
    add_head = new_head or partial(replace_head, after=config.head_after, dropout=config.dropout)
    model, variables = _with_head(add_head, model, variables, splits.train, task)
    if objective is None:
        objective = make_objective(task, config, splits.train)
    if run_options.get("log_every", 1) < 1:
        raise RequestError("log_every must be at least 1 step")
    plan = make_plan(model, config, len(splits.train), loading.batch_size)
    variables = _with_adapter(model, variables, plan, seed, run_options)
    counts = accumulate((phase.epochs for phase in plan.phases), initial=0)
    phases = tuple(
        phase._replace(rates=label(variables["params"], phase.table), epochs_before=count)
        for phase, count in zip(plan.phases, counts, strict=False)
    )
    plan = plan._replace(phases=phases)
    for rates, later in pairwise(flatten(phase.rates) for phase in phases):
        if frozen := [path for path, rate in rates.items() if rate and not later[path]]:
            # A checkpoint holds the trainable parameters of its own phase only.
            fault = "is trained in one phase and frozen in the next"
            raise RequestError(f"{frozen[0]} {fault}: keep it trainable")
    if plan.start == "probe" and not model.has_linear_head:
        raise RequestError(
            f"--recipe {config.recipe} starts with a probe, which needs a linear head: choose "
            "another recipe, such as finetune"
        )
    if plan.start == "random":
        variables = init(model, jax.random.key(seed))
    run_options["objective"] = objective
    mesh = mesh or training_mesh(config, loading)
    return Run(plan, model, variables, None, splits, loading, seed, mesh, task, **run_options)


def training_mesh(config: FitConfig, loading: Loading) -> Mesh:
    """Return the mesh of the devices to train on.

    Raises:
        RequestError: there are fewer devices than asked for, or a single one for ``fsdp``.
    """
    mesh = data_mesh(loading.devices)
    if config.fsdp and mesh.size == 1:
        raise RequestError("--fsdp divides memory among devices, and there is one: leave it out")
    return mesh


def _check_labels(splits: Splits) -> None:
    """Check that labels fit the task, and that epochs can be compared on the validation images."""
    for source in splits[:2]:
        shape = (len(source), *(() if source.task.has_classes else (len(source.classes),)))
        if source.labels.shape != shape:
            raise RequestError(
                f"the task {source.task.kind} needs labels {list(shape)}, "
                f"got {list(source.labels.shape)}"
            )
    source, task, classes = splits.val, splits.train.task, splits.train.classes
    if source.task.kind != task.kind or source.classes != classes:
        raise RequestError(
            "training and validation images differ in their task or classes: label both alike"
        )
    if task.has_classes and (source.labels < 0).any():
        raise RequestError("a validation image has no label: label all, to compare epochs")
    if not task.has_classes and np.isnan(source.labels).all():
        raise RequestError("no label of a validation image is known: label some")


def _with_head(
    add_head: NewHead, model: Model, variables: Variables, source: Source, task: Task
) -> tuple[Model, Variables]:
    """Add the head for a task, and check its number of outputs."""
    outputs = task.num_outputs(len(source.classes))
    if not outputs:
        raise RequestError("the training images have no labels: label them")
    model, variables = add_head(model, variables, outputs)
    if model.num_classes != outputs:
        per = "class" if task.kind == "classification" else f"output of the task {task.kind}"
        raise RequestError(
            f"new_head made {model.num_classes} outputs, not {outputs}, one per {per}"
        )
    return model, variables


def _with_adapter(
    model: Model, variables: Variables, plan: Plan, seed: int, run_options: dict[str, Any]
) -> Variables:
    """Add the parameters of an adapter to the variables, and its functions to the run."""
    if not plan.phases:
        return variables
    functions = adapter_functions(plan.config)
    if functions and run_options.get("materialize", combine) is not combine:
        raise RequestError("--adapter lora has a materialize of its own: leave out one of them")
    run_options |= functions
    key = jax.random.fold_in(jax.random.key(seed), crc32(b"adapter"))
    return add_adapter(model, variables, plan.config, key)


def _check_replaced(
    config: FitConfig, changed: set[str], objective: Objective | None, new_head: NewHead | None
) -> None:
    """Refuse options of the default objective and head if the caller replaces these."""
    conditions: Conditions = (
        (
            "loss focal_gamma label_smoothing class_weights",
            lambda _: objective is None,
            "with a custom objective",
        ),
        ("dropout head_after", lambda _: new_head is None, "with a custom head"),
    )
    if lines := find_unused_settings(config, conditions, changed):
        raise RequestError("; ".join(lines.values()))


def fitted_task(source: Source) -> Task:
    """Return the task of the training images, with the mean and scale of numbers.

    Raises:
        RequestError: a number is the same for all images, unknown or infinite.
    """
    if source.task.kind != "regression":
        return source.task
    numbers, known = source.labels.astype(np.float64), ~np.isnan(source.labels)
    counts = np.maximum(known.sum(0), 1)
    if np.isinf(numbers).any():
        raise RequestError("a number of the training images is infinite: make it NaN or remove it")
    mean = numbers.sum(0, where=known) / counts
    scale = np.sqrt(np.square(numbers - mean).sum(0, where=known) / counts)
    for name, spread in zip(source.classes, scale, strict=True):
        if not spread > 0:
            raise RequestError(f"{name} is the same number for all training images: remove it")
    return replace(source.task, mean=tuple(mean.tolist()), scale=tuple(scale.tolist()))


def check_task(config: FitConfig, task: Task) -> FitConfig:
    """Return the options with the default of ``choose_by`` for a task.

    Raises:
        RequestError: an option does not fit the task.
    """
    kind, augmentation = task.kind, config.augmentation
    choices = ("loss", *METRICS[kind])
    if config.choose_by not in (None, *choices):
        raise RequestError(
            f"--choose-by {config.choose_by} does not fit the task {kind}: choose from "
            + ", ".join(choices)
        )
    if config.attacker is not None and kind != "classification":
        raise RequestError(
            f"--attack {config.adversary.attack} trains on classes, and the task is {kind}: "
            "leave it out"
        )
    if kind in ("regression", "ordinal") and (augmentation.mixup or augmentation.cutmix):
        raise RequestError(f"--mixup and --cutmix do not fit the task {kind}: leave them out")
    if config.balance and kind == "regression":
        raise RequestError("--balance: numbers have no classes to balance: leave it out")
    return replace(config, choose_by=config.choose_by or default_choice(kind))


def check_images(model: Model, config: FitConfig) -> None:
    """Check that the augmentation and the attack are defined for the images of a network.

    Raises:
        RequestError: one of them is not.
    """
    preprocess, layers = model.preprocess, config.augmentation.randaugment_layers
    if layers and (config.augment or config.recipe in ("bit", "scratch")):
        check_randaugment(preprocess.channels, preprocess.dtype)
    if config.attacker is not None and preprocess.dtype != "uint8":
        raise RequestError(
            f"--attack {config.adversary.attack} needs images of 8 bits, whose range is known: "
            "leave it out"
        )


def begin_phase(
    run: Run, inputs: Inputs, phase: Phase, variables: Variables, schedule: optax.Schedule
) -> tuple[TrainState, Variables, TrainStep]:
    """Return the initial state of a phase, its frozen variables and its training step."""
    optimizer = phase_optimizer(run, phase, schedule)
    changing, frozen = phase_variables(run, phase, variables)
    if run.config.fsdp:  # before the optimizer's state is made, which then is sharded alike
        changing = run.place(changing)
    state = run.place(phase_state(run, changing, optimizer))
    return state, run.place(frozen), phase_step(run, phase, optimizer, inputs.start)


def phase_optimizer(
    run: Run, phase: Phase, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Return the optimizer of a phase, with the transformation of the run."""
    optimizer = build_optimizer(run.config.optimizer, phase.rates, schedule)
    if isinstance(run.transform, optax.GradientTransformation):
        return optax.chain(run.transform, optimizer)
    return optimizer if run.transform is None else run.transform(optimizer)


def phase_variables(run: Run, phase: Phase, variables: Variables) -> tuple[Variables, Variables]:
    """Return the variables that a phase changes, and its frozen ones, to place on the devices."""
    changing, frozen = split(variables, phase.rates, _statistics(run, phase))
    if run.config.frozen_dtype == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen["params"])
        frozen = {**frozen, "params": params}
    return changing, frozen


def phase_state(
    run: Run, changing: Variables, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the initial state of a phase, given the variables that it changes."""
    ema = run.config.ema_decay > 0
    return init_state(changing["params"], changing["batch_stats"], optimizer, ema=ema)


def phase_step(
    run: Run, phase: Phase, optimizer: optax.GradientTransformation, start: str | None
) -> TrainStep:
    """Return the training step of a phase, which activations enter at ``start``, or images."""
    config = run.config
    return make_train_step(
        replace(run.model, drop_path=config.drop_path),
        optimizer,
        adversarial(run.objective, config.attacker) if config.attacker else run.objective,
        run.materialize,
        start=start,
        batch_statistics=_statistics(run, phase),
        noise=wholly_trained_stages(phase.rates),
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        augment=config.augmentation if config.augment and start is None else None,
        **memory_options(run.mesh, remat=config.remat, fsdp=config.fsdp),
        parameter_noise=run.parameter_noise,
    )


def _statistics(run: Run, phase: Phase) -> frozenset[str]:
    """Return the stages that use batch statistics in a phase."""
    if run.config.batch_norm != "batch":
        return frozenset()
    return frozenset(wholly_trained_stages(phase.rates))
