"""Robust accuracy of a data set, over a list of epsilons, on all devices."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tljax.attack.contract import Attack, LogitsFn, as_float, as_tree, check_images
from tljax.attack.flags import check_network, check_outcome
from tljax.attack.losses import mean_logits
from tljax.metrics.classification import standard_error
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh, divisible, local_rows, replicate, shard
from tljax.runtime.progress import track
from tljax.runtime.types import Array

_SMALL = 8  # how many small batches make a full one


class Share(NamedTuple):
    """A share of ``n`` examples.

    Attributes:
        value: in [0, 1].
        error: its standard error, ``sqrt(value * (1 - value) / n)``.
    """

    value: float
    error: float


def share(which: np.ndarray) -> Share:
    """The share of True among ``[n]`` bool."""
    value = float(np.mean(which))
    return Share(value, standard_error(value, len(which)))


class Outcome(NamedTuple):
    """What an attack did; each ``[epsilons, n]`` bool, False where the network was wrong anyway.

    Attributes:
        right: whether the network still is.
        rounded: also after the adversarial image was rounded inward to 8 bits. None of nested
            radii: the image of a smaller one stands for it, and rounding soon undoes that.
        other: whether the other network is right about the adversarial image; None without one.
    """

    right: np.ndarray
    rounded: np.ndarray | None
    other: np.ndarray | None


class Robustness(NamedTuple):
    """How a network stood up to some attacks.

    Attributes:
        epsilons: ``[k]`` ascending.
        clean: ``[n]`` bool, whether the network is right about each image.
        other_clean: the same of the other network; None without one.
        outcomes: by attack. With ``survivors_only`` each includes the attacks before it.
        flags: reasons for doubt, by name; see `tljax.attack.flags`.
    """

    epsilons: np.ndarray
    clean: np.ndarray
    other_clean: np.ndarray | None
    outcomes: dict[str, Outcome]
    flags: dict[str, str]

    @property
    def right(self) -> np.ndarray:
        """``[k, n]`` bool, whether no attack fooled the network."""
        return np.logical_and.reduce([outcome.right for outcome in self.outcomes.values()])

    def accuracy(self, attack: str | None = None) -> list[Share]:
        """Robust accuracy for each epsilon under one attack, by default under the worst of all."""
        return [share(row) for row in (self.outcomes[attack].right if attack else self.right)]

    def rounded_accuracy(self, attack: str) -> list[Share] | None:
        """`accuracy` if the adversarial images are saved with 8 bits; None of nested radii."""
        rounded = self.outcomes[attack].rounded
        return None if rounded is None else [share(row) for row in rounded]

    def transfer(self, attack: str) -> list[Share | None]:
        """Of the images that fool this network and that both saw right, the share that fools both.

        For each epsilon; None where there is no such image.

        Raises:
            RequestError: there was no other network.
        """
        right, _, other = self.outcomes[attack]
        if other is None or self.other_clean is None:
            raise RequestError("transfer: evaluate(other=...) was not given a second network")
        rows = self.clean & self.other_clean & ~right
        return [
            share(~fooled[row]) if row.any() else None
            for row, fooled in zip(rows, other, strict=True)
        ]

    def worst(self, count: int) -> np.ndarray:
        """Examples that the network saw right, those first that the smallest epsilon fools."""
        needed = self.right.sum(0)
        fooled = np.flatnonzero(self.clean & ~self.right.all(0))
        return fooled[np.argsort(needed[fooled], kind="stable")][:count]


def evaluate(
    logits_fn: LogitsFn,
    data: tuple[Array, Array] | Iterable[Sequence[Any]],
    key: jax.Array,
    *,
    epsilons: Sequence[float],
    attacks: Mapping[str, Attack],
    survivors_only: bool = False,
    nested: bool = False,
    other: LogitsFn | None = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> Robustness:
    """Attacks every image of a data set that the network sees right.

        attacks = {"pgd": partial(pgd, num_steps=20), "apgd": apgd}
        found = evaluate(logits_fn, (images, labels), key, epsilons=[4 / 255], attacks=attacks)
        print(found.accuracy("pgd"), found.accuracy(), found.flags)

    AutoAttack is ``attacks=ensemble(num_classes), survivors_only=True``.

    Args:
        logits_fn: images to logits.
        data: images ``[n, height, width, 3]`` and labels ``[n]``; or batches
            ``(images, labels, mask, ...)``, of which the rows in the mask count. Images are uint8,
            or floating point in [0, 1]; all are held on the host. Labels of -1 do not count.
        key: random key.
        epsilons: radii in the units of images in [0, 1], in any order; one program serves all.
        attacks: by name, in order.
        survivors_only: whether an attack gets only what those before it could not fool.
        nested: whether an image that a smaller epsilon fooled counts as fooled, by the same
            adversarial image, and is not attacked again: the small ball lies in the large one. Much
            faster, and accuracies never rise with epsilon, as those of single attacks can.
        other: a second network, which the adversarial images are shown, too.
        batch_size: rounded up to a multiple of the number of devices. What does not fill a batch is
            padded, or if it fills less than half of it put into batches of an eighth.
        mesh: by default all devices of this process.
        quiet: whether to show no progress on stderr.

    Raises:
        RequestError: no images, attacks or epsilons, or a label that the network has no logit for.
    """
    images, labels = _collect(data)
    radii = np.sort(np.asarray(epsilons, np.float32))
    finite = radii.ndim == 1 and radii.size and 0 <= radii[0] <= radii[-1] < np.inf
    if not finite or not attacks:
        raise RequestError(
            f"evaluate needs finite epsilons of at least 0 and attacks, got {epsilons}"
        )
    if jax.process_count() > 1:
        raise RequestError("evaluate runs on the devices of one process: give each its own images")
    classes = jax.eval_shape(logits_fn, as_float(images[:1])).shape[-1]
    if labels.max() >= classes:
        raise RequestError(
            f"evaluate: label {labels.max()}, but the network has {classes} classes: is it the "
            "right network for these images?"
        )
    mesh = mesh or data_mesh()
    size = divisible(min(batch_size, len(images)), mesh)
    networks = [as_tree(network) for network in (logits_fn, other) if network is not None]
    networks = replicate(networks, mesh)

    def run(function: Any, rows: np.ndarray, *arguments: Any, name: str) -> list[np.ndarray]:
        found, parts = [], _split(rows, size, divisible(max(size // _SMALL, 1), mesh))
        for part, length in track(
            parts, description=name, total=len(rows), size=lambda part: len(part[0]), quiet=quiet
        ):
            x = np.zeros((length, *images.shape[1:]), images.dtype)
            y = np.full(length, -1, np.int32)  # no prediction: padding is fooled from the start
            x[: len(part)], y[: len(part)] = images[part], labels[part]
            outputs = function(networks, *shard((x, y), mesh), *arguments)
            found.append([local_rows(output)[: len(part)] for output in outputs])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    clean, *others = run(_clean, np.arange(len(images)), name="clean")
    flags = check_network(logits_fn, as_float(images[:size]), labels[:size])
    table = np.zeros((len(attacks), 2 + len(others), len(radii), len(images)), bool)
    for k, epsilon in enumerate(radii):
        standing = np.zeros(table.shape[1::2], bool)
        for number, (name, attack) in enumerate(attacks.items()):
            todo = standing[0] if survivors_only and number else clean
            if nested and k:
                smaller = table[number, :, k - 1]
                standing, todo = np.where(todo, smaller, standing), todo & smaller[0]
            rows = np.flatnonzero(todo)
            if rows.size:
                radius = f"{name} {255 * epsilon:.6g}/255"
                standing[:, rows] = run(partial(_attacked, attack), rows, key, epsilon, name=radius)
            table[number, :, k] = standing
    outcomes = {
        name: Outcome(cells[0], None if nested else cells[1], cells[2] if others else None)
        for name, cells in zip(attacks, table, strict=True)
    }
    flags |= check_outcome({name: outcome.right for name, outcome in outcomes.items()})
    return Robustness(radii, clean, others[0] if others else None, outcomes, flags)


def round_inward(adversarial: jax.Array, images: jax.Array) -> jax.Array:
    """Adversarial images in [0, 1] on the grid of 8-bit images, no farther from the images.

    A pixel is rounded towards the image. That keeps it in the ball if the image is on the grid
    itself; where there is no grid point between the two, the nearest is taken.
    """
    rounding = 1e-4  # of a step: what float32 leaves of a grid point
    at, to = (
        jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)) * 255 for x in (adversarial, images)
    )
    towards = jnp.where(at > to, jnp.floor(at + rounding), jnp.ceil(at - rounding))
    between = (towards - at) * (towards - to) <= rounding
    return jnp.clip(jnp.where(between, towards, jnp.round(at)), 0, 255) / 255


def _split(rows: np.ndarray, size: int, small: int) -> list[tuple[np.ndarray, int]]:
    """Batches of rows and how long to make each, of two lengths.

    The few survivors of the attacks before would be lost in a full batch, which takes its time.
    """
    full = len(rows) - len(rows) % size
    tail = rows[full:]
    length = small if len(tail) <= size // 2 else size
    return [
        *((rows[start : start + size], size) for start in range(0, full, size)),
        *((tail[start : start + length], length) for start in range(0, len(tail), length)),
    ]


def _right(network: LogitsFn, images: jax.Array, labels: jax.Array) -> jax.Array:
    return mean_logits(network, images).argmax(-1) == labels


@jax.jit
def _clean(networks: list[LogitsFn], images, labels) -> list[jax.Array]:
    return [_right(network, as_float(images), labels) for network in networks]


@partial(jax.jit, static_argnums=0)
def _attacked(attack: Attack, networks: list[LogitsFn], images, labels, key, epsilon):
    x = as_float(images)
    adversarial = attack(networks[0], x, labels, key, epsilon=epsilon)
    looks = [(network, adversarial) for network in networks]
    looks.insert(1, (networks[0], round_inward(adversarial, x).astype(x.dtype)))
    return [_right(network, shown, labels) for network, shown in looks]


def _collect(data: tuple[Array, Array] | Iterable[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "shape"):
        data = [(*data, np.ones(len(data[1]), bool))]
    parts = []
    for images, labels, mask, *_ in data:
        if len(images) != len(labels):
            raise RequestError(f"evaluate: {len(images)} images have {len(labels)} labels")
        keep = np.asarray(mask) & (np.asarray(labels) >= 0)
        parts.append((np.asarray(images)[keep], np.asarray(labels)[keep]))
    if not sum(len(labels) for _, labels in parts):
        raise RequestError("evaluate was given no labelled image")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if images.dtype != np.uint8:
        check_images(images, (0.0, 1.0))
    return images, labels.astype(np.int32)
