"""What comes before the first step: the plan, the head, the images, and what a phase changes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tljax.data.loader import num_batches
from tljax.data.options import Loading
from tljax.data.sources import Splits
from tljax.features.probe import Probe, fit_probe
from tljax.models import Model, init, replace_head
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh, is_writer, replicate
from tljax.runtime.settings import idle, settings
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables
from tljax.train.freeze import combine, first_trainable_stage, label, partition, training_stages
from tljax.train.inputs import Inputs, open_inputs
from tljax.train.optimizer import build_optimizer, learning_rate_schedule
from tljax.train.options import ASKED_CONDITIONS, FitConfig
from tljax.train.recipes import Plan, make_plan
from tljax.train.step import StepConfig, TrainState, TrainStep, init_state, make_train_step

NewHead = Callable[[Model, Variables, int], tuple[Model, Variables]]


@dataclass(frozen=True)
class Setup:
    """A recipe, ready to run.

    Attributes:
        plan: the recipe, spelled out.
        model: with a head for the classes of the data.
        variables: from which training starts.
        probe: the linear probe that is their head; None for a recipe without.
        labels: for each phase, the rate of every parameter.
        splits: what to learn from and what to measure on.
        loading: how images are read, in batches no larger than the training set.
        seed: of everything random.
        mesh: the devices.
        transform: what gradients go through before the optimizer.
    """

    plan: Plan
    model: Model
    variables: Variables
    probe: Probe | None
    labels: tuple[Variables, ...]
    splits: Splits
    loading: Loading
    seed: int
    mesh: Mesh
    transform: optax.GradientTransformation | None

    @property
    def config(self) -> FitConfig:
        """As asked, with every default filled in."""
        return self.plan.config

    @property
    def steps_per_epoch(self) -> int:
        """Batches, the ragged last one among them."""
        return num_batches(len(self.splits.train), self.loading.batch_size)

    def schedule(self, phase: int) -> optax.Schedule:
        """The learning rate by step of a phase."""
        steps = self.plan.phases[phase].epochs * self.steps_per_epoch
        return learning_rate_schedule(self.config.optimizer, steps)

    def open_inputs(self, start: str) -> Inputs:
        """The images, or the activations that enter ``start``."""
        return open_inputs(
            self.model, self.variables, self.splits, self.config, self.loading, self.seed, start
        )


def prepare(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig | None,
    loading: Loading | None,
    seed: int,
    new_head: NewHead | None,
    transform: optax.GradientTransformation | None,
) -> tuple[Setup, Inputs]:
    """Everything up to the first step, and the inputs of the first phase; see `fit`."""
    loading = loading or Loading()
    loading = replace(loading, batch_size=min(loading.batch_size, len(splits.train)))
    config = config or FitConfig()
    changed = {name for name, _ in settings(config).items() - settings(FitConfig()).items()}
    for note in idle(config, ASKED_CONDITIONS, changed).values() if is_writer() else ():
        print(f"note: {note}", file=sys.stderr)
    classes, head = len(splits.train.classes), model.stages[-1].name
    if new_head is None:
        new_head = partial(replace_head, after=config.head_after, dropout=config.dropout)
    model, variables = new_head(model, variables, classes)
    plan = make_plan(model, config, len(splits.train), loading.batch_size)
    config = plan.config
    labels = tuple(label(variables["params"], phase.table) for phase in plan.phases)
    for before, after in pairwise(map(flatten, labels)):
        if lost := [path for path, rate in before.items() if rate and not after[path]]:
            # A checkpoint holds what its own phase trains, and all else is as it was at first.
            raise RequestError(f"{lost[0]} trains and then stays: a later phase trains more, too")
    if plan.start == "probe" and variables["params"][head].keys() != {"kernel", "bias"}:
        raise RequestError(
            f"--recipe {config.recipe} starts with a probe, which needs a linear head; "
            "choose another recipe, such as finetune"
        )
    if plan.start == "random":
        variables = init(model, jax.random.key(seed))
    mesh = data_mesh(loading.devices)
    setup = Setup(plan, model, variables, None, labels, splits, loading, seed, mesh, transform)
    inputs = setup.open_inputs(first_trainable_stage(model, labels[0]) if labels else head)
    if plan.start != "probe":
        return setup, inputs
    features = inputs.pooled(model, variables)
    probe = fit_probe(features.values, features.labels, num_classes=classes, seed=seed)
    solved = {"kernel": np.asarray(probe.kernel), "bias": np.asarray(probe.bias)}
    variables = {**variables, "params": {**variables["params"], head: solved}}
    return replace(setup, variables=variables, probe=probe), inputs


@dataclass(frozen=True)
class Division:
    """Variables of two kinds: those that a phase changes, and those that stay.

    Attributes:
        labels: the rate of every parameter.
        training: the stages that run on the statistics of the batch, or drop features out.
    """

    labels: Variables
    training: frozenset[str]

    def split(self, variables: Variables) -> tuple[Variables, Variables]:
        """Those that change, and those that stay."""
        parts = partition(variables["params"], self.labels)
        stats = variables["batch_stats"]
        return (
            {
                "params": parts[0],
                "batch_stats": {k: v for k, v in stats.items() if k in self.training},
            },
            {
                "params": parts[1],
                "batch_stats": {k: v for k, v in stats.items() if k not in self.training},
            },
        )

    def join(self, changing: Variables, staying: Variables) -> Variables:
        """The inverse of `split`."""
        return {
            "params": combine(changing["params"], staying["params"]),
            "batch_stats": {**staying["batch_stats"], **changing["batch_stats"]},
        }


def divide(setup: Setup, labels: Variables) -> Division:
    """What a phase changes."""
    config, whole = setup.config, training_stages(labels)
    training = whole if config.batch_norm == "batch" else frozenset[str]()
    if config.dropout:
        training |= whole & {setup.model.stages[-1].name}
    return Division(labels, training)


def first_state(
    setup: Setup,
    inputs: Inputs,
    division: Division,
    variables: Variables,
    schedule: optax.Schedule,
) -> tuple[TrainState, Variables, TrainStep]:
    """The state before the first step of a phase, what stays throughout it, and the step."""
    config = setup.config
    optimizer = build_optimizer(config.optimizer, division.labels, schedule)
    if setup.transform is not None:
        optimizer = optax.chain(setup.transform, optimizer)
    changing, staying = division.split(variables)
    state = init_state(
        changing["params"], changing["batch_stats"], optimizer, average=config.ema_decay > 0
    )
    how = StepConfig(
        division.training,
        config.label_smoothing,
        _class_weights(setup),
        config.ema_decay,
        config.accumulate,
        config.augmentation if config.augment and inputs.start is None else None,
        config.attacker,
    )
    step = make_train_step(setup.model, optimizer, how, start=inputs.start)
    if config.frozen_dtype == "bfloat16":
        held = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), staying["params"])
        staying = {**staying, "params": held}
    return replicate(state, setup.mesh), replicate(staying, setup.mesh), step


def _class_weights(setup: Setup) -> tuple[float, ...]:
    """Weights that make every class count alike, of mean 1 over the images."""
    if setup.config.class_weights == "none":
        return ()
    labels = setup.splits.train.labels
    counts = np.bincount(labels, minlength=len(setup.splits.train.classes))
    return tuple((len(labels) / (len(counts) * np.maximum(counts, 1))).tolist())
