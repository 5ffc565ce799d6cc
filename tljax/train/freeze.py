"""What trains: one ordered table of (path pattern, rate), and the partition that follows from it.

A parameter's path is ``stage/.../name``, such as ``layer3/block0/conv1/kernel``. The first pattern
that matches it gives the multiple of the learning rate at which it trains, and so its group; at 0
it is frozen and never reaches the gradient or the optimizer.
"""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

from tljax.models import Model, abstract_variables
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Variables

FROZEN = 0.0

Table = Sequence[tuple[str, float]]
"""(pattern, rate) pairs; ``*`` matches any run of characters, slashes too."""


def freeze_table(
    model: Model,
    *,
    freeze_to: str | None = None,
    train: Sequence[str] = (),
    rates: Sequence[str] = (),
    layer_decay: float = 1.0,
) -> Table:
    """The table of a few common wishes. Without any, everything trains at the full rate.

    Args:
        model: for the names of its stages.
        freeze_to: every stage up to and including this one is frozen.
        train: patterns or stages that train, also several in one string with commas between them;
            all others are frozen.
        rates: ``PATTERN=RATE`` or ``STAGE=RATE``; they come first in the table, so they win.
        layer_decay: a stage trains at this multiple of the rate of the stage after it (ULMFiT,
            https://arxiv.org/abs/1801.06146; ELECTRA, https://arxiv.org/abs/2003.10555).

    Raises:
        RequestError: the model has no such stage, a rate is not a number of 0 or more, two wishes
            exclude each other, or nothing is left to train.
    """
    train = tuple(name.strip() for names in train for name in names.split(","))
    if freeze_to and train:
        raise RequestError("--freeze-to and --train say the same thing twice: give one of them")
    if not 0 < layer_decay <= 1:
        raise RequestError(f"--layer-decay {layer_decay}: choose a number in (0, 1]")
    head = model.stages[-1].name
    if freeze_to == head:
        raise RequestError(
            f"freezing to '{freeze_to}' leaves nothing to train; freeze to an earlier stage"
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
            raise RequestError(f"--layer-decay is for stages, and '{patterns[0]}' is none")
        table += [(_pattern(model, name), 1.0) for name in patterns]
    table += [(f"{name}/*", layer_decay ** depth[name]) for name in stages]
    return (*table, ("*", FROZEN)) if train else tuple(table)


def _rate(model: Model, text: str) -> tuple[str, float]:
    pattern, _, number = text.rpartition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not pattern or not 0 <= rate < float("inf"):
        raise RequestError(f"--rates {text}: write PATTERN=RATE with a rate of 0 or more")
    return _pattern(model, pattern), rate


def _pattern(model: Model, text: str) -> str:
    """A stage's name is short for everything in it; no pattern without a slash or a star is one."""
    if "/" in text or "*" in text:
        return text
    model.position(text)
    return f"{text}/*"


def label(params: Variables, table: Table) -> Variables:
    """The rate of every parameter, in a tree of the same shape.

    Raises:
        RequestError: no pattern covers a parameter, a pattern matches none, or nothing trains.
    """
    flat = flatten(params)
    labels = {
        path: next((rate for pattern, rate in table if fnmatchcase(path, pattern)), None)
        for path in flat
    }
    uncovered = [path for path, rate in labels.items() if rate is None]
    if uncovered:
        raise RequestError(
            f"no pattern covers {uncovered[0]} and {len(uncovered) - 1} other parameters; "
            "end the table with ('*', rate)"
        )
    for pattern, _ in table:
        if not any(fnmatchcase(path, pattern) for path in flat):
            raise RequestError(
                f"'{pattern}' matches no parameter; one is called {next(iter(flat))}"
            )
    if not any(labels.values()):
        raise RequestError("everything is frozen; let at least the head train")
    return unflatten(labels)


def partition(tree: Variables, labels: Variables) -> tuple[Variables, Variables]:
    """Splits parameters into (trainable, frozen): two trees that `combine` puts together again."""
    flat, rates = flatten(tree), flatten(labels)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if rates[path] != FROZEN}),
        unflatten({path: leaf for path, leaf in flat.items() if rates[path] == FROZEN}),
    )


def combine(trainable: Variables, frozen: Variables) -> Variables:
    """The inverse of `partition`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def split(
    variables: Variables, rates: Variables, statistics: Collection[str]
) -> tuple[Variables, Variables]:
    """Split variables into those that training changes, and those that stay.

    Args:
        variables: of the whole network.
        rates: of every parameter; see `label`.
        statistics: the stages whose running statistics move.
    """
    trainable, frozen = partition(variables["params"], rates)
    moving, still = {}, {}
    for name, stats in variables["batch_stats"].items():
        (moving if name in statistics else still)[name] = stats
    return (
        {"params": trainable, "batch_stats": moving},
        {"params": frozen, "batch_stats": still},
    )


def join(
    changing: Variables,
    staying: Variables,
    materialize: Callable[[Variables, Variables], Variables] = combine,
) -> Variables:
    """Put together again what `split` took apart."""
    return {
        "params": materialize(changing["params"], staying["params"]),
        "batch_stats": {**staying["batch_stats"], **changing["batch_stats"]},
    }


def trainable_stages(model: Model, labels: Variables) -> list[str]:
    """The stages of which at least one parameter trains, in order."""
    return [name for name in model.stage_names if any(flatten(labels.get(name, {})).values())]


def first_trainable_stage(model: Model, labels: Variables) -> str:
    """The stage at which the gradient ends: every stage before it is frozen as a whole."""
    return trainable_stages(model, labels)[0]


def wholly_trained_stages(labels: Variables) -> frozenset[str]:
    """The stages of which every parameter trains: those that may use batch statistics and noise."""
    return frozenset(name for name, rates in labels.items() if all(flatten(rates).values()))
