"""From a network and images to what attacks did: a table, a curve, and adversarial pictures."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from tljax import attack as library
from tljax.attack.contract import Attack, LogitsFn
from tljax.attack.ensemble import title
from tljax.attack.evaluate import Robustness, Share, share
from tljax.data.loader import load_batches, refuse_none
from tljax.data.options import Loading
from tljax.data.sources import Source, ambiguous, match_classes, select
from tljax.features.evaluate import settle
from tljax.models import Model, apply
from tljax.pretrained import Pretrained
from tljax.pretrained.catalog import names_like
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh
from tljax.runtime.progress import track
from tljax.runtime.types import Variables
from tljax.studies.pictures import Picture
from tljax.train.run_directory import skipped_lines

ATTACKS: dict[str, Any] = {
    "fgsm": library.fgsm,
    "bim": library.bim,
    "mi-fgsm": library.mi_fgsm,
    "pgd": library.pgd,
    "apgd-ce": library.apgd,
    "apgd-dlr": partial(library.apgd, loss="dlr"),
    "apgd-t": library.apgd_t,
    "fab-t": library.fab_t,
    "square": library.square,
    "deepfool": library.deepfool,
    "cw": library.carlini_wagner,
    "autoattack": library.auto_attack,
}
"""By the names that AutoAttack and the papers have."""

_NORMS = {"cw": ("l2",)} | dict.fromkeys(("fgsm", "bim", "mi-fgsm", "pgd"), ("linf", "l2", "l1"))
"""Those that an attack knows, where they are not Linf and L2."""


class Victims(NamedTuple):
    """What is attacked.

    Attributes:
        images: ``[n, size, size, 3]`` uint8.
        labels: ``[n]`` int32: the data's, or where it has none what the network sees.
        names: ``[n]`` what to call each.
        notes: remarks for a person, one line each.
    """

    images: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    notes: list[str]


class Painting(NamedTuple):
    """One image, attacked and drawn.

    Attributes:
        pictures: the photograph, the perturbation, and the adversarial image.
        line: what was done and seen, for a person.
        facts: the same for a machine.
    """

    pictures: list[Picture]
    line: str
    facts: dict[str, Any]


def logits_fn(network: Pretrained) -> LogitsFn:
    """Images to logits; the weights are arguments of what is compiled, not constants in it."""
    return Partial(_forward(network.model), jax.tree.map(jnp.asarray, network.variables))


def choose_attacks(
    names: Sequence[str],
    *,
    norm: str = "linf",
    num_steps: int | None = None,
    target: int | None = None,
) -> dict[str, Attack]:
    """Attacks by name, ready for `tljax.attack.evaluate`.

    Args:
        names: of `ATTACKS`.
        norm: "linf", "l2" or "l1".
        num_steps: of those that take steps, and Square's queries; by default each one's own.
        target: the class wanted; by default any mistake.

    Raises:
        RequestError: an unknown attack, or one that cannot do what is asked.
    """
    chosen: dict[str, Attack] = {}
    for name in names:
        if name not in ATTACKS:
            raise RequestError(f"there is no attack '{name}'; choose from {', '.join(ATTACKS)}")
        if name == "autoattack":
            library.ensemble(10, norm=norm)  # an error of its own names the member that is missing
        norms = _NORMS.get(name, ("linf", "l2"))
        if norm not in norms:
            raise RequestError(f"{name} knows no norm but {' and '.join(norms)}: leave it out")
        function = ATTACKS[name]
        known = inspect.signature(function).parameters
        options: dict[str, Any] = {"norm": norm} if "norm" in known else {}
        if num_steps is not None:
            steps = "num_queries" if name == "square" else "num_steps"
            options |= {steps: num_steps} if steps in known else {}
        if target is not None and "targets" not in known:
            able = [k for k, f in ATTACKS.items() if "targets" in inspect.signature(f).parameters]
            raise RequestError(f"{name} takes no --target; {', '.join(able)} do")
        attack = partial(function, **options)
        chosen[name] = attack if target is None else partial(_towards, attack, target)
    return chosen


def read_victims(
    network: Pretrained,
    source: Source,
    loading: Loading,
    *,
    count: int | None = None,
    seed: int = 0,
) -> Victims:
    """Reads images and finds out what they show.

    Args:
        network: any.
        source: with or without labels. The labels are matched with the network's by name.
        loading: see `Loading`.
        count: how many to take; by default all.
        seed: which ones.

    Raises:
        RequestError: no class in common, or no image that can be read.
    """
    model, _, card = network
    notes: list[str] = []
    same: dict[str, list[int]] = {}
    if source.classes:
        names = names_like(card.classes, source.classes)
        same = ambiguous(source.classes, names)
        matched, remarks = match_classes(source, names)
        source, notes = matched, list(remarks)
    if count is not None and count < len(source):
        chosen = np.random.default_rng(seed).choice(len(source), count, replace=False)
        source = select(source, np.sort(chosen))
    skipped: dict[int, str] = {}
    batches = load_batches(
        source,
        model.preprocess,
        batch_size=loading.batch_size,
        workers=loading.workers,
        on_bad_image=loading.on_bad_image,
        skipped=skipped,
    )
    parts, see = [], logits_fn(network)
    for batch in track(
        batches, description="read", total=len(source), size=lambda batch: int(batch.mask.sum())
    ):
        labels = np.asarray(batch.targets)
        if not source.classes:
            labels = np.asarray(_predict(see, batch.inputs).argmax(-1))
        elif same:
            labels = settle(labels, np.asarray(_predict(see, batch.inputs)), same)
        parts.append([np.asarray(a)[batch.mask] for a in (batch.inputs, labels, batch.indices)])
    refuse_none(source, skipped)
    images, labels, indices = map(np.concatenate, zip(*parts, strict=True))
    notes += skipped_lines(source, skipped)
    return Victims(images, labels.astype(np.int32), [source.names[int(i)] for i in indices], notes)


def attack(
    network: Pretrained,
    victims: Victims,
    attacks: Mapping[str, Attack],
    epsilons: Sequence[float],
    loading: Loading,
    *,
    seed: int = 0,
    nested: bool = False,
) -> Robustness:
    """How the network stands up; `tljax.attack.evaluate` says what to what.

    AutoAttack is run as it is meant to be: each of its attacks on what those before have left. Its
    outcome is called as `tljax.attack.ensemble.title` has it, "autoattack" or with its numbers;
    "autoattack until fab-t" is what there was after that part.

    Args:
        network: any.
        victims: the images.
        attacks: of `choose_attacks`.
        epsilons: radii in the units of images in [0, 1].
        loading: for the batch size and the devices.
        seed: of the random starts.
        nested: whether an image that a smaller epsilon fooled is not attacked again.

    Raises:
        RequestError: no attacks, or no or negative epsilons.
    """
    run = partial(
        library.evaluate,
        logits_fn(network),
        (victims.images, victims.labels),
        jax.random.key(seed),
        epsilons=epsilons,
        nested=nested,
        batch_size=loading.batch_size,
        mesh=data_mesh(loading.devices),
    )
    alone = {name: each for name, each in attacks.items() if not _is_ensemble(each)}
    reports = [run(attacks=alone)] if alone or not attacks else []
    for ensemble in filter(_is_ensemble, attacks.values()):
        options = getattr(ensemble, "keywords", {})
        parts = library.ensemble(network.model.num_classes, **options)
        whole = run(attacks=parts, survivors_only=True)
        *until, last = whole.outcomes.items()
        name = title(**options)
        outcomes = {f"{name} until {part}": outcome for part, outcome in until} | {name: last[1]}
        reports.append(whole._replace(outcomes=outcomes))
    return reports[0]._replace(
        outcomes={name: outcome for one in reports for name, outcome in one.outcomes.items()},
        flags={name: flag for one in reports for name, flag in one.flags.items()},
    )


def table(found: Robustness) -> str:
    """Accuracies with their standard errors, in percent, and what is left of it on 8 bits."""
    clean = share(found.clean)
    header = ["epsilon * 255", "0", *(f"{epsilon * 255:.6g}" for epsilon in found.epsilons)]
    rows = [header]
    for name in found.outcomes:
        rows.append([name, *map(_cell, [clean, *found.accuracy(name)])])
        if (rounded := found.rounded_accuracy(name)) is not None:
            rows.append(["  saved as PNG", *map(_cell, [clean, *rounded])])
    if len(found.outcomes) > 1:
        rows.append(["worst of all", *map(_cell, [clean, *found.accuracy()])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([f"accuracy in % of {len(found.clean)} images, +- standard error", *lines])


def summary(found: Robustness) -> dict[str, Any]:
    """What ``--json`` prints; an epsilon is in units of 1/255."""
    names = [f"{epsilon * 255:.4g}" for epsilon in found.epsilons]

    def by_epsilon(shares: Sequence[Share]) -> dict[str, float]:
        return dict(zip(names, (share.value for share in shares), strict=True))

    return {
        "clean": float(found.clean.mean()),
        "robust": {name: by_epsilon(found.accuracy(name)) for name in found.outcomes},
        "robust_rounded": {
            name: by_epsilon(rounded)
            for name in found.outcomes
            if (rounded := found.rounded_accuracy(name)) is not None
        },
        "examples": len(found.clean),
        "flags": found.flags,
    }


def paint(
    network: Pretrained,
    victims: Victims,
    attacks: Mapping[str, Attack],
    found: Robustness,
    *,
    count: int = 8,
    target: int | None = None,
    seed: int = 0,
) -> list[Painting]:
    """Adversarial images of 8 bits, by the last of the attacks.

    Each has the smallest epsilon at which the network still mistakes what is saved; with a target,
    and where there is no such epsilon, the largest.

    Args:
        network: the one attacked.
        victims: the images.
        attacks: those that were run.
        found: what they did.
        count: how many images, the most easily fooled first.
        target: the class wanted, of which the captions then tell as well.
        seed: of the attacks.
    """
    name, last = list(attacks.items())[-1]
    name = title(**getattr(last, "keywords", {})) if _is_ensemble(last) else name
    rest = np.setdiff1d(np.arange(len(found.clean)), found.worst(len(found.clean)))
    rows = np.concatenate([found.worst(count), rest])[:count].astype(int)
    right, rounded, _ = found.outcomes[name]
    fooled = ~(right if rounded is None else rounded)[:, rows] & found.clean[rows]
    needed = np.where(fooled.any(0), fooled.argmax(0), len(found.epsilons) - 1)
    if target is not None:
        needed[:] = len(found.epsilons) - 1
    epsilons, labels = found.epsilons[needed], victims.labels[rows]
    images = victims.images[rows] / np.float32(255)

    see = logits_fn(network)
    adversarial = last(see, images, labels, jax.random.key(seed), epsilon=epsilons)
    on_grid = library.round_inward(adversarial, jnp.asarray(images))
    before, exact, after = (
        np.asarray(jax.nn.softmax(_predict(see, x))) for x in (images, adversarial, on_grid)
    )
    saved = np.asarray(jnp.rint(on_grid * 255), np.uint8)

    def seen(probabilities: np.ndarray, index: int) -> dict[str, Any]:
        return {
            "name": network.card.classes[index],
            "index": index,
            "probability": float(probabilities[index]),
        }

    paintings = []
    for i, row in enumerate(rows):
        change = saved[i].astype(int) - victims.images[row]
        factor = 127 // max(1, int(np.abs(change).max()))
        probabilities = {"before": before[i], "exact": exact[i], "after": after[i]}
        facts: dict[str, Any] = {
            "path": victims.names[row],
            "attack": name,
            "epsilon": round(float(epsilons[i]) * 255, 6),
            **{when: seen(p, int(p.argmax())) for when, p in probabilities.items()},
        }
        if target is not None:
            facts["target"] = {
                "name": network.card.classes[target],
                **{when: float(p[target]) for when, p in probabilities.items()},
            }
        captions = {when: _caption(facts, when) for when in probabilities}
        number = int(row)
        file = victims.names[number].rpartition("/")[2]
        radius = f"{name}, epsilon {facts['epsilon']:.4g}/255"
        pictures = [
            Picture(f"{number}-photograph", f"{file}\n{captions['before']}", victims.images[row]),
            Picture(
                f"{number}-perturbation",
                f"{radius}\nperturbation x {factor}",
                (127 + factor * change).astype(np.uint8),
            ),
            Picture(f"{number}-adversarial", f"adversarial\n{captions['after']}", saved[i]),
        ]
        one_line = {when: caption.replace("\n", ", ") for when, caption in captions.items()}
        line = (
            f"{victims.names[row]}: {one_line['before']}; {radius}: {one_line['exact']}; "
            f"as PNG: {one_line['after']}"
        )
        paintings.append(Painting(pictures, line, facts))
    return paintings


@cache
def _forward(model: Model) -> Callable[[Variables, jax.Array], jax.Array]:
    """One function object for each model, so that nothing is compiled twice."""
    return lambda variables, images: apply(model, variables, images).logits


@jax.jit
def _predict(see: Any, images: jax.Array) -> jax.Array:
    return see(images)


def _is_ensemble(attack: Any) -> bool:
    return getattr(attack, "func", attack) is library.auto_attack


def _towards(
    attack: Any, target: int, see: LogitsFn, images: jax.Array, *args: Any, **options: Any
) -> jax.Array:
    return attack(see, images, *args, targets=jnp.full(len(images), target), **options)


def _cell(share: Share) -> str:
    return f"{100 * share.value:.1f} +- {100 * share.error:.1f}"


def _caption(facts: Mapping[str, Any], when: str) -> str:
    caption = f"{facts[when]['name']}, p {facts[when]['probability']:.3f}"
    if "target" in facts and facts["target"]["name"] != facts[when]["name"]:
        probability = facts["target"][when]
        digits = ".3f" if probability >= 1e-3 else ".0e"
        caption += f"\n{facts['target']['name']}, p {probability:{digits}}"
    return caption
