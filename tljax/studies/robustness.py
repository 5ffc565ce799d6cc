"""Adversarial robustness of a network: accuracy under attacks, and adversarial pictures."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float32, Int32, Num

from tljax import attack as library
from tljax.attack.contract import Attack
from tljax.attack.ensemble import title
from tljax.attack.evaluate import Robustness, Share, share
from tljax.attack.types import LogitsFn
from tljax.data.examples import Source, is_labeled, select
from tljax.data.loader import load_batches, require_readable_image
from tljax.data.options import Loading
from tljax.explain.pictures import as_rgb, to_pixels
from tljax.features.evaluate import match_network, resolve_ambiguous_labels
from tljax.features.extract import gather_skipped, process_shard
from tljax.models import Model, apply
from tljax.pretrained import Card, Pretrained
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh, gather
from tljax.runtime.progress import track
from tljax.runtime.tables import format_table
from tljax.runtime.types import Array, Variables
from tljax.studies.attack_captions import LabelTarget, Target, class_facts, label_facts
from tljax.studies.pictures import Picture, as_values
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

LABEL_ATTACKS = ("fgsm", "bim", "mi-fgsm", "pgd", "apgd-ce")
"""Attacks on networks with several labels; the others are defined for exclusive classes."""

_NORMS = {"cw": ("l2",)} | dict.fromkeys(("fgsm", "bim", "mi-fgsm", "pgd"), ("linf", "l2", "l1"))
"""Norms that an attack supports, if these are not Linf and L2."""


class AttackedImages(NamedTuple):
    """Images to attack.

    Attributes:
        images: ``[n, size, size, channels]`` uint8, or float32 in [0, 1].
        labels: labels of the data, or predictions where the data has none: ``[n]`` int32 class
            indices of the network; for several labels ``[n, labels]`` float32 of 0, 1 and NaN,
            which is unknown.
        names: names of the images.
        notes: notes on the data, one line of text each.
    """

    images: Num[np.ndarray, "n size size channels"]
    labels: Int32[np.ndarray, " n"] | Float32[np.ndarray, "n labels"]
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


def require_attackable(card: Card) -> None:
    """Check that attacks are defined for what a network predicts.

    Raises:
        RequestError: it predicts numbers or ordered classes.
    """
    if card.task.kind not in ("classification", "multilabel"):
        what = "numbers" if card.task.kind == "regression" else "ordered classes"
        raise RequestError(
            f"{card.source} predicts {what}: attacks are defined for classes and for labels only"
        )


def find_target(card: Card, name: str) -> Target:
    """Find the class or label that an attack is to reach.

    Args:
        card: metadata of a network.
        name: name or index of a class, or of a label that is to be predicted; ``not:LABEL`` for a
            label that is not to be predicted.

    Raises:
        RequestError: there is no such class or label.
    """
    if card.task.kind != "multilabel":
        return card.index_of(name)
    applies = not name.startswith("not:") or name in card.classes
    return LabelTarget(card.index_of(name if applies else name.removeprefix("not:")), applies)


def choose_attacks(
    names: Sequence[str],
    *,
    norm: str = "linf",
    num_steps: int | None = None,
    target: Target | None = None,
    several_labels: bool = False,
) -> dict[str, Attack]:
    """Return attacks by name, with their options, for `tljax.attack.evaluate`.

    Args:
        names: names in `ATTACKS`.
        norm: norm of the perturbation: "linf", "l2" or "l1".
        num_steps: number of gradient steps, or queries of Square; by default each attack's own.
            Attacks without steps ignore it.
        target: what the network is to predict; by default any wrong prediction counts.
        several_labels: whether the network predicts several labels instead of one class.

    Raises:
        RequestError: an attack is unknown, or does not support the norm, a target or several
            labels.
    """
    attacks: dict[str, Attack] = {}
    for name in names:
        if name not in ATTACKS:
            raise RequestError(f"there is no attack '{name}': choose from {', '.join(ATTACKS)}")
        if several_labels and name not in LABEL_ATTACKS:
            raise RequestError(
                f"{name} is defined for exclusive classes: for several labels choose from "
                f"{', '.join(LABEL_ATTACKS)}"
            )
        if name == "autoattack":
            library.ensemble(10, norm=norm)  # raises if a member does not support the norm
        norms = _NORMS.get(name, ("linf", "l2"))
        if norm not in norms:
            raise RequestError(
                f"{name} supports only the norm {' and '.join(norms)}: remove --norm"
            )
        parameters = _parameters(name)
        options: dict[str, Any] = {"norm": norm} if "norm" in parameters else {}
        if several_labels:
            options["loss"] = "bce"
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
    target: Target | None = None,
) -> AttackedImages:
    """Read images to attack, with labels of the data or else predictions of the network.

    Several processes read a part each, and all get all of them.

    With several labels, images without a known label are left out. With the target of one label
    only those images are read to which it applies if it is not to be predicted, or the other way
    round, and which the network predicts so.

    Args:
        network: any network.
        source: images with or without labels. Classes are matched with the network's by name.
        loading: options of how images are read.
        count: number of images to choose at random; by default all.
        seed: seed of the choice.
        target: target of the attacks.

    Raises:
        RequestError: data and network have no class in common, no image can be read, or none is
            left for the target.
    """
    model, predict = network.model, logits_fn(network)
    source, ambiguous_classes, notes = _match(network.card, source)
    if count is not None and count < len(source):
        chosen = np.random.default_rng(seed).choice(len(source), count, replace=False)
        source = select(source, np.sort(chosen))
    skipped: dict[int, str] = {}
    batches = load_batches(
        source,
        model.preprocess,
        batch_size=loading.batch_size,
        shard=process_shard(),
        multiple=jax.process_count(),
        workers=loading.workers,
        on_bad_image=loading.on_bad_image,
        skipped=skipped,
    )
    several = network.card.task.kind == "multilabel"
    parts = []
    for batch in track(
        batches, description="read", total=len(source), size=lambda batch: int(batch.mask.sum())
    ):
        labels, rows = np.asarray(batch.targets), np.asarray(batch.mask)
        if several:
            predicted = _predict_labels(network, batch.inputs)
            labels = labels if source.classes else predicted
            if isinstance(target, LabelTarget):
                rows = rows & _is_without(target, labels) & _is_without(target, predicted)
        elif not source.classes:
            labels = np.asarray(_predict(predict, batch.inputs).argmax(-1))
        elif ambiguous_classes:
            logits = np.asarray(_predict(predict, batch.inputs))
            labels = resolve_ambiguous_labels(labels, logits, ambiguous_classes)
        kept = gather(rows)
        parts.append([gather(np.asarray(a))[kept] for a in (batch.inputs, labels, batch.indices)])
    gather_skipped(skipped)
    require_readable_image(source, skipped)
    images, labels, indices = map(np.concatenate, zip(*parts, strict=True))
    notes += skipped_lines(source, skipped)
    if isinstance(target, LabelTarget):
        verb = "does not apply to and is not" if target.applies else "applies to and is"
        which = f"that '{network.card.classes[target.label]}' {verb} predicted for"
        if not len(images):
            raise RequestError(f"there is no image to attack {which}")
        notes.append(f"attacked are the {len(images)} images {which}")
    labels = labels.astype(np.float32 if several else np.int32)
    return AttackedImages(images, labels, [source.names[int(i)] for i in indices], notes)


def _match(card: Card, source: Source) -> tuple[Source, dict[str, list[int]], list[str]]:
    """Match labels with those of the network, as `match_network`; leave out unknown ones."""
    several, notes = card.task.kind == "multilabel", list[str]()
    if several and source.classes and source.task.has_classes:
        notes.append("the labels are classes, not those of the network: its predictions count")
        source = replace(source, classes=())
    if not source.classes:
        return source, {}, notes
    source, ambiguous_classes, remarks = match_network(source, card.classes, card.task)
    notes += remarks
    known = is_labeled(source.labels) if several else np.full(len(source), True)
    if not known.any():
        raise RequestError("no label of any image is known")
    if not known.all():
        notes.append(f"left out {np.count_nonzero(~known)} images without a known label")
        source = select(source, np.flatnonzero(known))
    return source, ambiguous_classes, notes


def _predict_labels(network: Pretrained, images: Array) -> Float32[np.ndarray, "batch labels"]:
    """Return 1 for predicted labels, 0 for others."""
    logits = np.asarray(_predict(logits_fn(network), images))
    return network.card.task.predict(logits).astype(np.float32)


def _is_without(target: LabelTarget, labels: np.ndarray) -> np.ndarray:
    return labels[:, target.label] == (not target.applies)


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
    single = {name: attack for name, attack in attacks.items() if not is_ensemble(attack)}
    reports = [run(attacks=single)] if single or not attacks else []
    for ensemble in filter(is_ensemble, attacks.values()):
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
        rows.append([name, *map(format_share, [clean, *robustness.accuracy(name)])])
        if (rounded := robustness.rounded_accuracy(name)) is not None:
            rows.append(["  saved as PNG", *map(format_share, [clean, *rounded])])
    if len(robustness.outcomes) > 1:
        rows.append(["worst of all", *map(format_share, [clean, *robustness.accuracy()])])
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
    target: Target | None = None,
    seed: int = 0,
) -> list[AttackPictures]:
    """Draw 8-bit adversarial images of the last attack.

    Each uses the smallest epsilon at which the 8-bit image fools the network, or the largest
    epsilon if there is none or a target is given. Captions give the predicted class; with several
    labels the predicted ones, and those that the attack changed.

    Args:
        network: attacked network.
        victims: attacked images.
        attacks: attacks that were run.
        robustness: their outcomes; with several labels those of `LabelRobustness.by_image`.
        count: number of images, those fooled at the smallest epsilon first.
        target: target of the attacks, whose probability captions then give.
        seed: seed of the random starts.
    """
    name, last = list(attacks.items())[-1]
    name = title(**getattr(last, "keywords", {})) if is_ensemble(last) else name
    rest = np.setdiff1d(np.arange(len(robustness.clean)), robustness.worst(len(robustness.clean)))
    rows = np.concatenate([robustness.worst(count), rest])[:count].astype(int)
    correct, rounded, _ = robustness.outcomes[name]
    fooled = ~(correct if rounded is None else rounded)[:, rows] & robustness.clean[rows]
    needed = np.where(fooled.any(0), fooled.argmax(0), len(robustness.epsilons) - 1)
    if target is not None:
        needed[:] = len(robustness.epsilons) - 1
    epsilons, labels = robustness.epsilons[needed], victims.labels[rows]
    images = as_values(victims.images[rows])

    predict, card = logits_fn(network), network.card
    adversarial = last(predict, images, labels, jax.random.key(seed), epsilon=epsilons)
    on_grid = library.round_inward(adversarial, jnp.asarray(images))
    before, exact, after = (
        card.task.decode(np.asarray(_predict(predict, x))) for x in (images, adversarial, on_grid)
    )
    original, saved = as_rgb(to_pixels(images)), as_rgb(to_pixels(on_grid))
    describe = label_facts if card.task.kind == "multilabel" else class_facts

    paintings = []
    for i, row in enumerate(rows):
        change = saved[i].astype(int) - original[i]
        factor = 127 // max(1, int(np.abs(change).max()))
        probabilities = {"before": before[i], "exact": exact[i], "after": after[i]}
        described, captions = describe(card, probabilities, target)
        facts: dict[str, Any] = {
            "path": victims.names[row],
            "attack": name,
            "epsilon": round(float(epsilons[i]) * 255, 6),
            **described,
        }
        number = int(row)
        file = victims.names[number].rpartition("/")[2]
        radius = f"{name}, epsilon {facts['epsilon']:.4g}/255"
        pictures = [
            Picture(f"{number}-photograph", f"{file}\n{captions['before']}", original[i]),
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


def is_ensemble(attack: Any) -> bool:
    """Return whether an attack of `choose_attacks` stands for several, which run one by one."""
    return getattr(attack, "func", attack) is library.auto_attack


def _towards(
    attack: Any,
    target: Target,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *args: Any,
    **options: Any,
) -> jax.Array:
    """Run an attack with the same target for all images."""
    if isinstance(target, LabelTarget):
        targets = jnp.full(labels.shape, jnp.nan).at[:, target.label].set(target.applies)
    else:
        targets = jnp.full(len(images), target)
    return attack(logits_fn, images, labels, *args, targets=targets, **options)


def format_share(share: Share) -> str:
    """Return a share and its standard error in percent."""
    return f"{100 * share.value:.1f} +- {100 * share.error:.1f}"
