"""AutoAttack: a fixed list of attacks, each on what the ones before could not fool."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.apgd import apgd, apgd_t
from tljax.attack.contract import Attack, LogitsFn, choose, compiled, prepare
from tljax.attack.fab import fab_t
from tljax.attack.losses import mean_logits
from tljax.attack.norms import Bounds
from tljax.attack.square import square
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array


def ensemble(
    num_classes: int,
    *,
    norm: str = "linf",
    version: str = "standard",
    num_steps: int = 100,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, Attack]:
    """Name the attacks of AutoAttack, in their order: for `evaluate`, or to be run by hand.

    "standard" is APGD-CE, APGD-T, FAB-T and Square. "rand" is for randomised networks (see
    `tljax.attack.eot.eot`): APGD-CE and APGD-DLR. With other numbers of steps or queries than the
    defaults it is not AutoAttack, and `title` says so.

    The DLR loss needs 3 classes and with targets 4; where there are fewer the margin stands in.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", 2020 (arXiv 2003.01690).

    Args:
        num_classes: number of logits.
        norm: "linf" or "l2".
        version: "standard" or "rand".
        num_steps: of each attack by gradients.
        num_queries: of Square.
        bounds: smallest and largest value of a pixel.

    Raises:
        RequestError: there is no such version, or a member does not know the norm.
    """
    if norm not in ("linf", "l2"):
        raise RequestError(f"AutoAttack for '{norm}' lacks apgd-ce: its norms here are linf and l2")
    options = {"norm": norm, "num_steps": num_steps, "stop_early": True, "bounds": bounds}
    climb = partial(apgd, **options)
    ce = partial(climb, loss="ce")
    if version == "rand":
        return {"apgd-ce": ce, "apgd-dlr": partial(climb, loss=_dlr_or_margin(num_classes, 3))}
    if version != "standard":
        raise RequestError(f"there is no ensemble '{version}'; choose from standard, rand")
    return {
        "apgd-ce": ce,
        "apgd-t": partial(apgd_t, loss=_dlr_or_margin(num_classes, 4), **options),
        "fab-t": partial(fab_t, **options),
        "square": partial(square, norm=norm, num_queries=num_queries, rescale=False, bounds=bounds),
    }


def title(
    *, version: str = "standard", num_steps: int = 100, num_queries: int = 5000, **_: Any
) -> str:
    """Call an `ensemble` "autoattack", and by its numbers where they are not AutoAttack's."""
    name = "autoattack" if version == "standard" else f"autoattack {version}"
    queries = "" if version == "rand" else f", {num_queries} queries"
    standard = num_steps == 100 and (version == "rand" or num_queries == 5000)
    return name if standard else f"{name}, {num_steps} steps{queries}"


def _dlr_or_margin(num_classes: int, needed: int) -> str:
    return "dlr" if num_classes >= needed else "margin"


@compiled
def auto_attack(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    epsilon: Array | float,
    ids: Array | None = None,
    norm: str = "linf",
    version: str = "standard",
    num_steps: int = 100,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """The whole `ensemble` as one attack, on one batch.

    For a data set `tljax.attack.evaluate.evaluate` with ``survivors_only`` is quicker: it fills the
    batches of each attack with the survivors of the one before.

    Args:
        logits_fn: images to logits.
        images: ``[n, height, width, 3]`` floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: random key.
        epsilon: radius of the ball in the units of the images; one number, or ``[n]``.
        ids: ``[n]`` int names of the examples (see `tljax.attack.pgd.pgd`).
        norm: "linf" or "l2".
        version: "standard" or "rand".
        num_steps: of each attack by gradients.
        num_queries: of Square.
        bounds: smallest and largest value of a pixel.

    Returns:
        The first image found that fools the network; the image itself if the network is wrong
        anyway, or cannot be fooled.

    Raises:
        RequestError: an argument has the wrong shape or type, or an unknown name.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    logits = mean_logits(logits_fn, images)
    options = {"norm": norm, "version": version, "num_steps": num_steps}
    attacks = ensemble(logits.shape[-1], num_queries=num_queries, bounds=bounds, **options)
    # Every prediction differs from -1: for an attack that example is fooled, and left alone.
    found, left = images, jnp.where(logits.argmax(-1) == labels, labels, -1)

    def run(attack: Attack, found: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = attack(logits_fn, images, left, key, epsilon=epsilon, ids=ids)
        fooled = (left >= 0) & (mean_logits(logits_fn, new).argmax(-1) != left)
        return choose(fooled, (new, jnp.full_like(left, -1)), (found, left))

    for attack in attacks.values():
        found, left = lax.cond(
            (left >= 0).any(), partial(run, attack), lambda *same: same, found, left
        )
    return found
