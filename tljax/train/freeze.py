"""Trainable and frozen parameters: a table of (path pattern, rate), and functions that apply it.

A parameter's path is ``stage/.../name``, such as ``layer3/block0/conv1/kernel``. The first pattern
of the table that matches it gives its rate, a multiple of the learning rate. Parameters of rate 0
are frozen: they get no gradient and no optimizer state.
"""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

from tljax.models import Model, abstract_variables
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Variables

FROZEN = 0.0
"""Rate of a frozen parameter."""

Table = Sequence[tuple[str, float]]
"""(pattern, rate) pairs in order of precedence; ``*`` matches any characters, also slashes."""


def freeze_table(
    model: Model,
    *,
    freeze_to: str | None = None,
    train: Sequence[str] = (),
    rates: Sequence[str] = (),
    layer_decay: float = 1.0,
    adapter: Sequence[str] = (),
) -> Table:
    """Return the table of learning rate multiples for common options.

    Without options, every parameter trains at rate 1.

    Args:
        model: network whose stages the options name.
        freeze_to: last frozen stage; all earlier stages are frozen, too.
        train: stages or patterns to train, all others being frozen; a string may hold several,
            separated by commas.
        rates: ``PATTERN=RATE`` or ``STAGE=RATE``, with a rate of 0 or more; they take precedence.
        layer_decay: ratio, in (0, 1], of a stage's rate to that of the next stage (ULMFiT,
            https://arxiv.org/abs/1801.06146; ELECTRA, https://arxiv.org/abs/2003.10555).
        adapter: paths of the parameters of an adapter, see `tljax.train.adapt`; only they and the
            head train.

    Returns:
        (pattern, rate) pairs, see `label`.

    Raises:
        RequestError: the model has no such stage, a value is out of range, or options contradict
            each other.
    """
    train = tuple(name.strip() for names in train for name in names.split(","))
    if freeze_to and train:
        raise RequestError("--freeze-to and --train exclude each other: set one of them")
    if adapter and train:
        raise RequestError("--adapter and --train exclude each other: set one of them")
    if not 0 < layer_decay <= 1:
        raise RequestError(f"--layer-decay {layer_decay}: choose a number in (0, 1]")
    head = model.stages[-1].name
    if freeze_to == head:
        raise RequestError(
            f"--freeze-to {freeze_to} leaves nothing to train: choose an earlier stage"
        )
    position = model.position(freeze_to) if freeze_to else -1
    table = [_rate(model, text) for text in rates]
    params = abstract_variables(model)["params"]
    with_params = [name for name in model.stage_names if name in params]
    table += [(f"{name}/*", FROZEN) for name in with_params if model.position(name) <= position]
    depth = {name: len(with_params) - 1 - i for i, name in enumerate(with_params)}
    stages = [name for name in with_params if model.position(name) > position]
    if train:
        stages = [name for name in train if name in with_params]
        patterns = [name for name in train if name not in with_params]
        if patterns and layer_decay != 1:
            raise RequestError(f"--layer-decay needs stages, and '{patterns[0]}' is a pattern")
        table += [(parameter_pattern(model, name), 1.0) for name in patterns]
    if adapter:
        table += [(path, layer_decay ** depth[path.split("/")[0]]) for path in adapter]
        stages = [head]
    table += [(f"{name}/*", layer_decay ** depth[name]) for name in stages]
    return (*table, ("*", FROZEN)) if train or adapter else tuple(table)


def _rate(model: Model, text: str) -> tuple[str, float]:
    pattern, _, number = text.rpartition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not pattern or not 0 <= rate < float("inf"):
        raise RequestError(f"--rates {text}: write PATTERN=RATE with a rate of 0 or more")
    return parameter_pattern(model, pattern), rate


def parameter_pattern(model: Model, text: str) -> str:
    """Return a pattern as it is, and the name of a stage as the pattern of its parameters."""
    if "/" in text or "*" in text:
        return text
    model.position(text)
    return f"{text}/*"


def label(params: Variables, table: Table) -> Variables:
    """Return the rate of every parameter, in a tree of the same structure.

    Args:
        params: parameters of a network; shapes are enough.
        table: (pattern, rate) pairs in order of precedence, see `freeze_table`.

    Raises:
        RequestError: no pattern matches a parameter, a pattern matches none, or all are frozen.
    """
    flat = flatten(params)
    labels = {
        path: next((rate for pattern, rate in table if fnmatchcase(path, pattern)), None)
        for path in flat
    }
    if unmatched := [path for path, rate in labels.items() if rate is None]:
        raise RequestError(
            f"no pattern matches {unmatched[0]} and {len(unmatched) - 1} other parameters: "
            "end the table with ('*', rate)"
        )
    for pattern, _ in table:
        if not any(fnmatchcase(path, pattern) for path in flat):
            raise RequestError(f"'{pattern}' matches no parameter, such as {next(iter(flat))}")
    if not any(labels.values()):
        raise RequestError("all parameters are frozen: train at least the head")
    return unflatten(labels)


def partition(tree: Variables, labels: Variables) -> tuple[Variables, Variables]:
    """Split parameters into (trainable, frozen); `combine` is the inverse."""
    flat, rates = flatten(tree), flatten(labels)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if rates[path] != FROZEN}),
        unflatten({path: leaf for path, leaf in flat.items() if rates[path] == FROZEN}),
    )


def combine(trainable: Variables, frozen: Variables) -> Variables:
    """Merge trainable and frozen parameters into one tree."""
    return unflatten(flatten(trainable) | flatten(frozen))


def split(
    variables: Variables, rates: Variables, statistics: Collection[str]
) -> tuple[Variables, Variables]:
    """Split variables into (changing, frozen): those that training updates, and the others.

    Args:
        variables: variables of the whole network.
        rates: rate of every parameter, see `label`.
        statistics: stages that use batch statistics, and so update their running statistics.

    Returns:
        Two dicts ``{"params": ..., "batch_stats": ...}``; `join` is the inverse.
    """
    trainable, frozen = partition(variables["params"], rates)
    updated, fixed = {}, {}
    for name, stats in variables["batch_stats"].items():
        (updated if name in statistics else fixed)[name] = stats
    return (
        {"params": trainable, "batch_stats": updated},
        {"params": frozen, "batch_stats": fixed},
    )


def join(
    changing: Variables,
    staying: Variables,
    materialize: Callable[[Variables, Variables], Variables] = combine,
) -> Variables:
    """Merge the two results of `split` into the variables of the network.

    Args:
        changing: trainable parameters and updated running statistics.
        staying: frozen parameters and fixed running statistics.
        materialize: ``(trainable, frozen) -> params``, the parametrization of the network; by
            default the union of both.
    """
    return {
        "params": materialize(changing["params"], staying["params"]),
        "batch_stats": {**staying["batch_stats"], **changing["batch_stats"]},
    }


def trainable_stages(model: Model, labels: Variables) -> list[str]:
    """Return the stages with at least one trainable parameter, in order."""
    return [name for name in model.stage_names if any(flatten(labels.get(name, {})).values())]


def first_trainable_stage(model: Model, labels: Variables) -> str:
    """Return the first stage with a trainable parameter, at which backpropagation ends."""
    return trainable_stages(model, labels)[0]


def wholly_trained_stages(labels: Variables) -> frozenset[str]:
    """Return the stages without frozen parameters, which may use batch statistics and noise."""
    return frozenset(name for name, rates in labels.items() if all(flatten(rates).values()))
