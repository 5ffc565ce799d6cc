"""What trains: one ordered table of (path pattern, group), and the partition that follows from it.

A parameter's path is ``stage/.../name``, such as ``layer3/block0/conv1/kernel``. The first pattern
that matches it names its group; the group `FROZEN` never reaches the gradient or the optimizer.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from tljax.errors import RequestError
from tljax.models import Model
from tljax.trees import flatten, unflatten
from tljax.types import Variables

FROZEN = "frozen"

Table = Sequence[tuple[str, str]]
"""(pattern, group) pairs; ``*`` matches any run of characters, slashes too."""


def freeze_to(model: Model, stage: str) -> Table:
    """Freezes every stage up to and including ``stage``; groups ``backbone`` and ``head`` train.

    Raises:
        RequestError: the model has no such stage, or it is the head.
    """
    last = model.position(stage)
    head = model.stages[-1].name
    if stage == head:
        raise RequestError(
            f"freezing to '{stage}' leaves nothing to train; freeze to an earlier stage"
        )
    frozen = ((f"{name}/*", FROZEN) for name in model.stage_names[: last + 1])
    return (*frozen, (f"{head}/*", "head"), ("*", "backbone"))


def label(params: Variables, table: Table) -> Variables:
    """The group of every parameter, in a tree of the same shape.

    Raises:
        RequestError: no pattern covers a parameter.
    """
    flat = flatten(params)
    labels = {
        path: next((group for pattern, group in table if fnmatchcase(path, pattern)), None)
        for path in flat
    }
    uncovered = [path for path, group in labels.items() if group is None]
    if uncovered:
        raise RequestError(
            f"no pattern covers {uncovered[0]} and {len(uncovered) - 1} other parameters; "
            "end the table with ('*', group)"
        )
    return unflatten(labels)


def partition(tree: Variables, labels: Variables) -> tuple[Variables, Variables]:
    """Splits parameters into (trainable, frozen): two trees that `combine` puts together again."""
    flat, groups = flatten(tree), flatten(labels)
    frozen = {path for path, group in groups.items() if group == FROZEN}
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path not in frozen}),
        unflatten({path: leaf for path, leaf in flat.items() if path in frozen}),
    )


def combine(trainable: Variables, frozen: Variables) -> Variables:
    """The inverse of `partition`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def first_trainable_stage(model: Model, labels: Variables) -> str:
    """The stage at which the gradient ends: every stage before it is frozen as a whole."""
    return next(
        name
        for name in model.stage_names
        if any(group != FROZEN for group in flatten(labels.get(name, {})).values())
    )
