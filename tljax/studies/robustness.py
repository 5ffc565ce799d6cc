"""Adversarial robustness of a network: accuracy under attacks, and adversarial pictures."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Int32, UInt8

from tljax import attack as library
from tljax.attack.contract import Attack
from tljax.attack.ensemble import title
from tljax.attack.evaluate import Robustness, Share, share
from tljax.attack.types import LogitsFn
from tljax.data.examples import Source, select
from tljax.data.loader import load_batches, require_readable_image
from tljax.data.options import Loading
from tljax.features.evaluate import match_network, resolve_ambiguous_labels
from tljax.models import Model, apply
from tljax.pretrained import Pretrained
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh
from tljax.runtime.progress import track
from tljax.runtime.tables import format_table
from tljax.runtime.types import Array, Variables
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
"""Attack functions by their names in AutoAttack and the papers."""

_NORMS = {"cw": ("l2",)} | dict.fromkeys(("fgsm", "bim", "mi-fgsm", "pgd"), ("linf", "l2", "l1"))
"""Norms that an attack supports, if these are not Linf and L2."""


class AttackedImages(NamedTuple):
    """Images to attack.

    Attributes:
        images: ``[n, size, size, 3]`` uint8.
        labels: ``[n]`` int32 class indices of the network: labels of the data, or predictions where
            the data has none.
        names: names of the images.
        notes: notes on the data, one line of text each.
    """

    images: UInt8[np.ndarray, "n size size 3"]
    labels: Int32[np.ndarray, " n"]
    names: Sequence[str]
    notes: list[str]


class AttackPictures(NamedTuple):
    """Pictures of one attacked image.

    Attributes:
        pictures: the image, the perturbation and the adversarial image.
        line: attack and predictions, as a line of text.
        facts: the same as JSON.
    """

    pictures: list[Picture]
    line: str
    facts: dict[str, Any]


def logits_fn(network: Pretrained) -> LogitsFn:
    """Return the network as a function from images to logits, with its weights as pytree leaves.

    So the weights are arguments of compiled functions, not constants in them.
    """
    return Partial(_forward(network.model), jax.tree.map(jnp.asarray, network.variables))


def choose_attacks(
    names: Sequence[str],
    *,
    norm: str = "linf",
    num_steps: int | None = None,
    target: int | None = None,
) -> dict[str, Attack]:
    """Return attacks by name, with their options, for `tljax.attack.evaluate`.

    Args:
        names: names in `ATTACKS`.
        norm: norm of the perturbation: "linf", "l2" or "l1".
        num_steps: number of gradient steps, or queries of Square; by default each attack's own.
            Attacks without steps ignore it.
        target: index of the class to predict; by default any wrong class counts.

    Raises:
        RequestError: an attack is unknown, or does not support the norm or a target.
    """
    attacks: dict[str, Attack] = {}
    for name in names:
        if name not in ATTACKS:
            raise RequestError(f"there is no attack '{name}': choose from {', '.join(ATTACKS)}")
        if name == "autoattack":
            library.ensemble(10, norm=norm)  # raises if a member does not support the norm
        norms = _NORMS.get(name, ("linf", "l2"))
        if norm not in norms:
            raise RequestError(
                f"{name} supports only the norm {' and '.join(norms)}: remove --norm"
            )
        parameters = _parameters(name)
        options: dict[str, Any] = {"norm": norm} if "norm" in parameters else {}
        steps = "num_queries" if name == "square" else "num_steps"
        if num_steps is not None and steps in parameters:
            options[steps] = num_steps
        if target is not None and "targets" not in parameters:
            targeted = ", ".join(name for name in ATTACKS if "targets" in _parameters(name))
            raise RequestError(f"{name} supports no --target: choose from {targeted}")
        attack = partial(ATTACKS[name], **options)
        attacks[name] = attack if target is None else partial(_towards, attack, target)
    return attacks


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(ATTACKS[name]).parameters


def read_attacked_images(
    network: Pretrained,
    source: Source,
    loading: Loading,
    *,
    count: int | None = None,
    seed: int = 0,
) -> AttackedImages:
    """Read images to attack, with labels of the data or else predictions of the network.

    Args:
        network: any network.
        source: images with or without labels. Classes are matched with the network's by name.
        loading: options of how images are read.
        count: number of images to choose at random; by default all.
        seed: seed of the choice.

    Raises:
        RequestError: data and network have no class in common, or no image can be read.
    """
    model, _, card = network
    notes: list[str] = []
    ambiguous_classes: dict[str, list[int]] = {}
    if source.classes:
        source, ambiguous_classes, remarks = match_network(source, card.classes)
        notes += remarks
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
    parts, predict = [], logits_fn(network)
    for batch in track(
        batches, description="read", total=len(source), size=lambda batch: int(batch.mask.sum())
    ):
        labels = np.asarray(batch.targets)
        if not source.classes:
            labels = np.asarray(_predict(predict, batch.inputs).argmax(-1))
        elif ambiguous_classes:
            logits = np.asarray(_predict(predict, batch.inputs))
            labels = resolve_ambiguous_labels(labels, logits, ambiguous_classes)
        parts.append([np.asarray(a)[batch.mask] for a in (batch.inputs, labels, batch.indices)])
    require_readable_image(source, skipped)
    images, labels, indices = map(np.concatenate, zip(*parts, strict=True))
    notes += skipped_lines(source, skipped)
    return AttackedImages(
        images, labels.astype(np.int32), [source.names[int(i)] for i in indices], notes
    )


def attack(
    network: Pretrained,
    victims: AttackedImages,
    attacks: Mapping[str, Attack],
    epsilons: Sequence[float],
    loading: Loading,
    *,
    seed: int = 0,
    nested: bool = False,
) -> Robustness:
    """Measure the accuracy of a network under attacks, see `tljax.attack.evaluate`.

    Each attack of AutoAttack runs only on the images that the attacks before it did not fool. Its
    outcome is named by `tljax.attack.ensemble.title`, such as "autoattack"; the outcome
    "autoattack until fab-t" is that of its attacks up to fab-t.

    Args:
        network: any network.
        victims: images to attack.
        attacks: attacks of `choose_attacks`.
        epsilons: radii of the perturbations, for images in [0, 1].
        loading: batch size and devices.
        seed: seed of the random starts.
        nested: whether to skip images at an epsilon if a smaller one fooled the network.

    Raises:
        RequestError: there are no attacks, no epsilons or negative ones.
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
    single = {name: attack for name, attack in attacks.items() if not _is_ensemble(attack)}
    reports = [run(attacks=single)] if single or not attacks else []
    for ensemble in filter(_is_ensemble, attacks.values()):
        options = getattr(ensemble, "keywords", {})
        parts = library.ensemble(network.model.num_classes, **options)
        whole = run(attacks=parts, survivors_only=True)
        *until, last = whole.outcomes.items()
        name = title(**options)
        outcomes = {f"{name} until {part}": outcome for part, outcome in until} | {name: last[1]}
        reports.append(whole._replace(outcomes=outcomes))
    return reports[0]._replace(
        outcomes={name: outcome for report in reports for name, outcome in report.outcomes.items()},
        flags={name: flag for report in reports for name, flag in report.flags.items()},
    )


def table(robustness: Robustness) -> str:
    """Return a text table of accuracies and their standard errors, in percent.

    The lines "saved as PNG" are those of adversarial images rounded to 8 bits.
    """
    clean = share(robustness.clean)
    header = ["epsilon * 255", "0", *(f"{epsilon * 255:.6g}" for epsilon in robustness.epsilons)]
    rows: list[list[str]] = []
    for name in robustness.outcomes:
        rows.append([name, *map(_cell, [clean, *robustness.accuracy(name)])])
        if (rounded := robustness.rounded_accuracy(name)) is not None:
            rows.append(["  saved as PNG", *map(_cell, [clean, *rounded])])
    if len(robustness.outcomes) > 1:
        rows.append(["worst of all", *map(_cell, [clean, *robustness.accuracy()])])
    title = f"accuracy in % of {len(robustness.clean)} images, +- standard error"
    return f"{title}\n{format_table(header, rows)}"


def summary(robustness: Robustness) -> dict[str, Any]:
    """Return the accuracies as JSON, by epsilon in units of 1/255."""
    names = [f"{epsilon * 255:.4g}" for epsilon in robustness.epsilons]

    def by_epsilon(shares: Sequence[Share]) -> dict[str, float]:
        return dict(zip(names, (share.value for share in shares), strict=True))

    return {
        "clean": float(robustness.clean.mean()),
        "robust": {name: by_epsilon(robustness.accuracy(name)) for name in robustness.outcomes},
        "robust_rounded": {
            name: by_epsilon(rounded)
            for name in robustness.outcomes
            if (rounded := robustness.rounded_accuracy(name)) is not None
        },
        "examples": len(robustness.clean),
        "flags": robustness.flags,
    }


def paint(
    network: Pretrained,
    victims: AttackedImages,
    attacks: Mapping[str, Attack],
    robustness: Robustness,
    *,
    count: int = 8,
    target: int | None = None,
    seed: int = 0,
) -> list[AttackPictures]:
    """Draw 8-bit adversarial images of the last attack.

    Each uses the smallest epsilon at which the 8-bit image fools the network, or the largest
    epsilon if there is none or a target is given.

    Args:
        network: attacked network.
        victims: attacked images.
        attacks: attacks that were run.
        robustness: their outcomes.
        count: number of images, those fooled at the smallest epsilon first.
        target: index of the target class, whose probability captions then give.
        seed: seed of the random starts.
    """
    name, last = list(attacks.items())[-1]
    name = title(**getattr(last, "keywords", {})) if _is_ensemble(last) else name
    rest = np.setdiff1d(np.arange(len(robustness.clean)), robustness.worst(len(robustness.clean)))
    rows = np.concatenate([robustness.worst(count), rest])[:count].astype(int)
    correct, rounded, _ = robustness.outcomes[name]
    fooled = ~(correct if rounded is None else rounded)[:, rows] & robustness.clean[rows]
    needed = np.where(fooled.any(0), fooled.argmax(0), len(robustness.epsilons) - 1)
    if target is not None:
        needed[:] = len(robustness.epsilons) - 1
    epsilons, labels = robustness.epsilons[needed], victims.labels[rows]
    images = victims.images[rows] / np.float32(255)

    predict = logits_fn(network)
    adversarial = last(predict, images, labels, jax.random.key(seed), epsilon=epsilons)
    on_grid = library.round_inward(adversarial, jnp.asarray(images))
    before, exact, after = (
        np.asarray(jax.nn.softmax(_predict(predict, x))) for x in (images, adversarial, on_grid)
    )
    saved = np.asarray(jnp.rint(on_grid * 255), np.uint8)

    def prediction(probabilities: np.ndarray, index: int) -> dict[str, Any]:
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
            **{when: prediction(p, int(p.argmax())) for when, p in probabilities.items()},
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
        paintings.append(AttackPictures(pictures, line, facts))
    return paintings


@cache
def _forward(model: Model) -> Callable[[Variables, jax.Array], jax.Array]:
    """Return the same function object for the same model, so that it is compiled once."""
    return lambda variables, images: apply(model, variables, images).logits


@jax.jit
def _predict(logits_fn: Any, images: jax.Array) -> jax.Array:
    return logits_fn(images)


def _is_ensemble(attack: Any) -> bool:
    return getattr(attack, "func", attack) is library.auto_attack


def _towards(
    attack: Any, target: int, logits_fn: LogitsFn, images: Array, *args: Any, **options: Any
) -> jax.Array:
    """Run an attack with the same target class for all images."""
    return attack(logits_fn, images, *args, targets=jnp.full(len(images), target), **options)


def _cell(share: Share) -> str:
    return f"{100 * share.value:.1f} +- {100 * share.error:.1f}"


def _caption(facts: Mapping[str, Any], when: str) -> str:
    caption = f"{facts[when]['name']}, p {facts[when]['probability']:.3f}"
    if "target" in facts and facts["target"]["name"] != facts[when]["name"]:
        probability = facts["target"][when]
        digits = ".3f" if probability >= 1e-3 else ".0e"
        caption += f"\n{facts['target']['name']}, p {probability:{digits}}"
    return caption
