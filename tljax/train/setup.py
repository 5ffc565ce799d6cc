"""What comes before the first step: the head, the plan, the images, and what a phase changes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

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
from tljax.runtime.parallel import Preemption, data_mesh, is_writer, replicate
from tljax.runtime.settings import Conditions, idle, settings
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables
from tljax.train.adversary import adversarial
from tljax.train.checkpoint import Checkpoints
from tljax.train.freeze import combine, first_trainable_stage, label, split, wholly_trained_stages
from tljax.train.inputs import Inputs, open_inputs
from tljax.train.objectives import Objective, cross_entropy
from tljax.train.optimizer import build_optimizer, learning_rate_schedule
from tljax.train.options import ASKED_CONDITIONS, FitConfig
from tljax.train.recipes import Phase, Plan, make_plan
from tljax.train.step import Materialize, TrainState, TrainStep, init_state, make_train_step

NewHead = Callable[[Model, Variables, int], tuple[Model, Variables]]

Wrapper = Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last.

    Attributes:
        plan: the recipe, spelled out for this network.
        model: with a head for the classes of the data.
        variables: from which training starts.
        probe: the linear probe that is their head; None for a recipe without.
        splits: what to learn from and what to measure on.
        loading: how images are read, in batches no larger than the training set.
        seed: of everything random.
        mesh: the devices.

    What the caller hands over follows, see `tljax.train.fit.fit`.
    """

    plan: Plan
    model: Model
    variables: Variables
    probe: Probe | None
    splits: Splits
    loading: Loading
    seed: int
    mesh: Mesh
    objective: Objective | None = None
    materialize: Materialize = combine
    transform: optax.GradientTransformation | Wrapper | None = None
    on_step: Callable[[int, dict[str, float]], None] | None = None
    log_every: int = 1
    on_epoch: Callable[[History], None] = lambda _: None
    checkpoints: Checkpoints | None = None
    checkpoint_seconds: float = 600
    profile: Path | None = None
    preemption: Preemption | None = None

    def tell(self, history: History) -> None:
        """Hand out a copy of the history."""
        self.on_epoch([dict(entry) for entry in history])

    @property
    def config(self) -> FitConfig:
        """As asked, with every default filled in."""
        return self.plan.config

    @property
    def steps_per_epoch(self) -> int:
        """Batches, the ragged last one among them."""
        return num_batches(len(self.splits.train), self.loading.batch_size)

    def schedule(self, phase: Phase) -> optax.Schedule:
        """The learning rate by step of a phase."""
        return learning_rate_schedule(self.config.optimizer, phase.epochs * self.steps_per_epoch)

    def open_inputs(self, start: str) -> Inputs:
        """The images, or the activations that enter ``start``."""
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
    **handed_over: Any,
) -> tuple[Run, Inputs]:
    """Do everything up to the first step; see `tljax.train.fit.fit`.

    Args:
        model: pretrained, with any head.
        variables: of ``model``.
        splits: what to learn from and what to measure on.
        config: what was asked.
        loading: how images are read.
        seed: of everything random.
        new_head: adds another head than a linear one.
        handed_over: further fields of `Run`.

    Returns:
        The run, and the inputs of its first phase.
    """
    loading = loading or Loading()
    loading = replace(loading, batch_size=min(loading.batch_size, len(splits.train)))
    config = config or FitConfig()
    changed = {name for name, _ in settings(config).items() - settings(FitConfig()).items()}
    for note in idle(config, ASKED_CONDITIONS, changed).values() if is_writer() else ():
        print(f"note: {note}", file=sys.stderr)
    _refuse_replaced(config, changed, handed_over.get("objective"), new_head)
    classes = len(splits.train.classes)
    add_head = new_head or partial(replace_head, after=config.head_after, dropout=config.dropout)
    model, variables = add_head(model, variables, classes)
    if not classes or (splits.val.labels < 0).any():
        raise RequestError("give every image of the validation a class: epochs are compared by it")
    if model.num_classes != classes:
        raise RequestError(f"new_head made {model.num_classes} outputs for {classes} classes")
    if handed_over.get("log_every", 1) < 1:
        raise RequestError("log_every: choose 1 step or more")
    head = model.stage_names[-1]
    plan = make_plan(model, config, len(splits.train), loading.batch_size)
    before = accumulate((phase.epochs for phase in plan.phases), initial=0)
    phases = tuple(
        phase._replace(rates=label(variables["params"], phase.table), before=passed)
        for phase, passed in zip(plan.phases, before, strict=False)
    )
    plan = plan._replace(phases=phases)
    for one, next_one in pairwise(flatten(phase.rates) for phase in phases):
        if lost := [path for path, rate in one.items() if rate and not next_one[path]]:
            # A checkpoint holds what its own phase trains, and all else is as it was at first.
            raise RequestError(f"{lost[0]} trains and then stays: a later phase trains more, too")
    if plan.start == "probe" and not model.has_linear_head:
        raise RequestError(
            f"--recipe {config.recipe} starts with a probe, which needs a linear head; "
            "choose another recipe, such as finetune"
        )
    if plan.start == "random":
        variables = init(model, jax.random.key(seed))
    mesh = data_mesh(loading.devices)
    run = Run(plan, model, variables, None, splits, loading, seed, mesh, **handed_over)
    inputs = run.open_inputs(first_trainable_stage(model, phases[0].rates) if phases else head)
    if plan.start != "probe":
        return run, inputs
    features = inputs.pooled(model, variables)
    probe = fit_probe(features.values, features.labels, num_classes=classes, seed=seed)
    solved = {"kernel": np.asarray(probe.kernel), "bias": np.asarray(probe.bias)}
    variables = {**variables, "params": {**variables["params"], head: solved}}
    return replace(run, variables=variables, probe=probe), inputs


def _refuse_replaced(
    config: FitConfig, changed: set[str], objective: Objective | None, new_head: NewHead | None
) -> None:
    """Refuse settings of what the caller has replaced."""
    ours, linear = objective is None, new_head is None
    conditions: Conditions = (
        ("label_smoothing class_weights", lambda _: ours, "with an objective of one's own"),
        ("dropout head_after", lambda _: linear, "with a head of one's own"),
    )
    if lines := idle(config, conditions, changed):
        raise RequestError("; ".join(lines.values()))


def begin_phase(
    run: Run, inputs: Inputs, phase: Phase, variables: Variables, schedule: optax.Schedule
) -> tuple[TrainState, Variables, TrainStep]:
    """Make the state before the first step of a phase, what stays throughout it, and the step."""
    config = run.config
    optimizer = build_optimizer(config.optimizer, phase.rates, schedule)
    if isinstance(run.transform, optax.GradientTransformation):
        optimizer = optax.chain(run.transform, optimizer)
    elif run.transform is not None:
        optimizer = run.transform(optimizer)
    whole = wholly_trained_stages(phase.rates)
    statistics = whole if config.batch_norm == "batch" else frozenset[str]()
    changing, staying = split(variables, phase.rates, statistics)
    state = init_state(
        changing["params"], changing["batch_stats"], optimizer, ema=config.ema_decay > 0
    )
    objective = run.objective or cross_entropy(config.label_smoothing, _class_weights(run))
    step = make_train_step(
        run.model,
        optimizer,
        adversarial(objective, config.attacker) if config.attacker else objective,
        run.materialize,
        start=inputs.start,
        batch_statistics=statistics,
        noise=whole,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        augment=config.augmentation if config.augment and inputs.start is None else None,
    )
    if config.frozen_dtype == "bfloat16":
        held = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), staying["params"])
        staying = {**staying, "params": held}
    return replicate(state, run.mesh), replicate(staying, run.mesh), step


def _class_weights(run: Run) -> tuple[float, ...]:
    """Weights that make every class count alike, of mean 1 over the images."""
    if run.config.class_weights == "none":
        return ()
    labels = run.splits.train.labels
    counts = np.bincount(labels, minlength=len(run.splits.train.classes))
    return tuple((len(labels) / (len(counts) * np.maximum(counts, 1))).tolist())
