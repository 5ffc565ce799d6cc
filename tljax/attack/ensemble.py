"""AutoAttack: a fixed sequence of attacks, each run on the examples that resisted the others."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.apgd import apgd, apgd_t
from tljax.attack.contract import Attack, choose, compiled, prepare
from tljax.attack.fab import fab_t
from tljax.attack.losses import mean_logits
from tljax.attack.square import square
from tljax.attack.types import Bounds, DeviceImages, Images, Labels, LogitsFn, PerExample
from tljax.runtime.errors import RequestError


def ensemble(
    num_classes: int,
    *,
    norm: str = "linf",
    version: str = "standard",
    num_steps: int = 100,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, Attack]:
    """Return the attacks of AutoAttack by name, in order, for `tljax.attack.evaluate.evaluate`.

    "standard" consists of APGD-CE, APGD-T, FAB-T and Square; "rand", for randomized networks (see
    `tljax.attack.eot.eot`), of APGD-CE and APGD-DLR. Results are only comparable with AutoAttack's
    for the default numbers of steps and queries; `title` names any others.

    The DLR loss needs 3 classes, or 4 with targets. For fewer classes the margin loss replaces it.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", 2020 (arXiv 2003.01690).

    Args:
        num_classes: number of logits.
        norm: "linf" or "l2".
        version: "standard" or "rand".
        num_steps: number of steps of each gradient-based attack.
        num_queries: number of queries of Square.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Raises:
        RequestError: the version is unknown, or an attack does not support the norm.
    """
    if norm not in ("linf", "l2"):
        raise RequestError(f"AutoAttack does not support norm '{norm}' (apgd-ce): use linf or l2")
    options = {"norm": norm, "num_steps": num_steps, "stop_early": True, "bounds": bounds}
    ce = partial(apgd, **options, loss="ce")
    if version == "rand":
        return {"apgd-ce": ce, "apgd-dlr": partial(ce, loss=_dlr_or_margin(num_classes, 3))}
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
    """Return the name of an `ensemble` for reports: "autoattack", with non-standard numbers."""
    name = "autoattack" if version == "standard" else f"autoattack {version}"
    queries = "" if version == "rand" else f", {num_queries} queries"
    standard = num_steps == 100 and (version == "rand" or num_queries == 5000)
    return name if standard else f"{name}, {num_steps} steps{queries}"


def _dlr_or_margin(num_classes: int, needed: int) -> str:
    return "dlr" if num_classes >= needed else "margin"


@compiled
def auto_attack(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    key: jax.Array,
    *,
    epsilon: PerExample,
    ids: Labels | None = None,
    norm: str = "linf",
    version: str = "standard",
    num_steps: int = 100,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Run all attacks of an `ensemble` on one batch (AutoAttack).

    For a data set, `tljax.attack.evaluate.evaluate` with ``survivors_only`` is faster: it fills the
    batches of each attack with the examples that resisted the previous ones.

    Source: Croce and Hein, 2020 (arXiv 2003.01690); see `ensemble`.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        images: ``[batch, height, width, 3]`` floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes.
        key: random key.
        epsilon: radius of the ball in the units of the images, one number or ``[batch]``.
        ids: ``[batch]`` integers that identify the examples (see `tljax.attack.pgd.pgd`).
        norm: "linf" or "l2".
        version: "standard" or "rand".
        num_steps: number of steps of each gradient-based attack.
        num_queries: number of queries of Square.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        The first image that fools the network; the original image if no attack succeeds, or if the
        network misclassifies it anyway.

    Raises:
        RequestError: an argument has the wrong shape or dtype, an unknown name, or a value out of
            range.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    logits = mean_logits(logits_fn, images)
    options = {"norm": norm, "version": version, "num_steps": num_steps}
    attacks = ensemble(logits.shape[-1], num_queries=num_queries, bounds=bounds, **options)
    # The label -1 differs from every prediction, so attacks treat the example as fooled already.
    state = images, jnp.where(logits.argmax(-1) == labels, labels, -1)

    def run(attack: Attack, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        remaining = state[1]
        new = attack(logits_fn, images, remaining, key, epsilon=epsilon, ids=ids)
        fooled = (remaining >= 0) & (mean_logits(logits_fn, new).argmax(-1) != remaining)
        return choose(fooled, (new, jnp.full_like(remaining, -1)), state)

    for attack in attacks.values():
        state = lax.cond((state[1] >= 0).any(), partial(run, attack), lambda same: same, state)
    return state[0]
