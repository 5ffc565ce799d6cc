"""Evaluation of robust accuracy: attacks on a data set for several epsilons, on all devices."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from tljax.attack.contract import Attack, as_float, as_partial, check_images
from tljax.attack.flags import check_network, check_outcome
from tljax.attack.losses import mean_logits
from tljax.attack.types import LogitsFn
from tljax.metrics.classification import standard_error
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import (
    data_mesh,
    process_share,
    replicate,
    round_up_to_devices,
    shard,
    to_host,
)
from tljax.runtime.prefetch import in_flight
from tljax.runtime.progress import track
from tljax.runtime.types import Array

_SMALL_BATCHES = 8  # number of small batches per full batch


class Share(NamedTuple):
    """A fraction of ``n`` examples.

    Attributes:
        value: the fraction, in [0, 1].
        error: its standard error, ``sqrt(value * (1 - value) / n)``.
    """

    value: float
    error: float


def share(condition: Bool[np.ndarray, " n"]) -> Share:
    """Compute the fraction of ``[n]`` bool values that are True."""
    value = float(np.mean(condition))
    return Share(value, standard_error(value, len(condition)))


class Outcome(NamedTuple):
    """The result of one attack.

    All arrays are ``[epsilons, n]`` bool, and False where the clean image is misclassified.

    Attributes:
        right: True where the network classifies the adversarial image correctly.
        rounded: the same after rounding the adversarial image to 8 bits with `round_inward`. None
            with ``nested``, where the image may be that of a smaller epsilon, which rounding often
            undoes.
        other: True where the second network classifies the adversarial image correctly; None
            without a second network.
    """

    right: Bool[np.ndarray, "epsilons n"]
    rounded: Bool[np.ndarray, "epsilons n"] | None
    other: Bool[np.ndarray, "epsilons n"] | None


class Robustness(NamedTuple):
    """The results of several attacks on a network.

    Attributes:
        epsilons: ``[epsilons]`` ascending.
        clean: ``[n]`` bool, True where the clean image is classified correctly.
        other_clean: the same for the second network; None without one.
        outcomes: results by the name of the attack. With ``survivors_only`` each includes the
            attacks before it.
        flags: warnings about the evaluation by name; see `tljax.attack.flags`.
    """

    epsilons: Float[np.ndarray, " epsilons"]
    clean: Bool[np.ndarray, " n"]
    other_clean: Bool[np.ndarray, " n"] | None
    outcomes: dict[str, Outcome]
    flags: dict[str, str]

    @property
    def right(self) -> Bool[np.ndarray, "epsilons n"]:
        """Return True where no attack fooled the network, ``[epsilons, n]``."""
        return np.logical_and.reduce([outcome.right for outcome in self.outcomes.values()])

    def accuracy(self, attack: str | None = None) -> list[Share]:
        """Compute the robust accuracy for each epsilon, for one attack or for all combined."""
        return [share(row) for row in (self.outcomes[attack].right if attack else self.right)]

    def rounded_accuracy(self, attack: str) -> list[Share] | None:
        """Compute `accuracy` for adversarial images saved with 8 bits; None with ``nested``."""
        rounded = self.outcomes[attack].rounded
        return None if rounded is None else [share(row) for row in rounded]

    def transfer(self, attack: str) -> list[Share | None]:
        """Compute the transfer rate to the second network for each epsilon.

        The rate is the fraction of adversarial images that fool the second network too, among those
        that fool the first and whose clean images both classify correctly; None if there are none.

        Raises:
            RequestError: the evaluation had no second network.
        """
        right, _, other = self.outcomes[attack]
        if other is None or self.other_clean is None:
            raise RequestError("transfer needs a second network: pass evaluate(other=...)")
        rows = self.clean & self.other_clean & ~right
        return [
            share(~fooled[row]) if row.any() else None
            for row, fooled in zip(rows, other, strict=True)
        ]

    def worst(self, count: int) -> np.ndarray:
        """Return the indices of ``count`` fooled examples, those of the smallest epsilon first."""
        resisted = self.right.sum(0)
        fooled = np.flatnonzero(self.clean & ~self.right.all(0))
        return fooled[np.argsort(resisted[fooled], kind="stable")][:count]


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
    """Compute robust accuracy: attack every correctly classified image of a data set.

        attacks = {"pgd": partial(pgd, num_steps=20), "apgd": apgd}
        result = evaluate(logits_fn, (images, labels), key, epsilons=[4 / 255], attacks=attacks)
        print(result.accuracy("pgd"), result.accuracy(), result.flags)

    For AutoAttack pass ``attacks=ensemble(num_classes), survivors_only=True``.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        data: images ``[n, height, width, 3]`` and labels ``[n]``, or batches
            ``(images, labels, mask, ...)`` with a bool mask of the rows to use. Images are uint8 or
            floating point in [0, 1], and stay in host memory. Labels of -1 are ignored.
        key: random key.
        epsilons: radii of the balls, for images in [0, 1], in any order. All share one compilation.
        attacks: attacks by name, in the order in which they run.
        survivors_only: run each attack only on the examples that resisted the previous attacks.
        nested: count an image as fooled if it was fooled with a smaller epsilon, by the same
            adversarial image, and do not attack it again. This is much faster, and the accuracy
            never increases with epsilon, as it can for single attacks.
        other: a second network, to measure how adversarial images transfer.
        batch_size: number of images per batch, rounded up to a multiple of the number of devices.
            The last batch is padded, or if less than half full split into batches of an eighth.
        mesh: the devices to use; by default all devices of all processes, which call this together
            with the same arguments.
        quiet: show no progress bar on stderr.

    Raises:
        RequestError: there are no images, attacks or epsilons, or a label has no logit.
    """
    images, labels = _collect(data)
    radii = check_request(epsilons, attacks)
    classes = jax.eval_shape(logits_fn, as_float(images[:1])).shape[-1]
    if labels.max() >= classes:
        raise RequestError(f"evaluate: label {labels.max()}, but the network has {classes} classes")
    mesh = mesh or data_mesh()
    size = round_up_to_devices(min(batch_size, len(images)), mesh)
    networks = [as_partial(network) for network in (logits_fn, other) if network is not None]
    # The label of padding, -1, counts as fooled from the start.
    run = partial(
        run_batches, replicate(networks, mesh), (images, labels), -1,
        size=size, mesh=mesh, quiet=quiet,
    )  # fmt: skip
    clean, *others = run(_clean, np.arange(len(images)), name="clean")
    flags = check_network(logits_fn, as_float(images[:size]), labels[:size])
    table = np.zeros((len(attacks), 2 + len(others), len(radii), len(images)), bool)
    for k, epsilon in enumerate(radii):
        survives = np.zeros(table.shape[1::2], bool)
        for number, (name, attack) in enumerate(attacks.items()):
            remaining = survives[0] if survivors_only and number else clean
            if nested and k:
                smaller = table[number, :, k - 1]
                survives, remaining = np.where(remaining, smaller, survives), remaining & smaller[0]
            rows = np.flatnonzero(remaining)
            if rows.size:
                radius = f"{name} {255 * epsilon:.6g}/255"
                survives[:, rows] = run(partial(_attacked, attack), rows, key, epsilon, name=radius)
            table[number, :, k] = survives
    outcomes = {
        name: Outcome(cells[0], None if nested else cells[1], cells[2] if others else None)
        for name, cells in zip(attacks, table, strict=True)
    }
    flags |= check_outcome({name: outcome.right for name, outcome in outcomes.items()})
    return Robustness(radii, clean, others[0] if others else None, outcomes, flags)


def check_request(epsilons: Sequence[float], attacks: Mapping[str, Attack]) -> np.ndarray:
    """Return the epsilons as float32 in ascending order.

    Raises:
        RequestError: there are no attacks, no epsilons or invalid ones.
    """
    radii = np.sort(np.asarray(epsilons, np.float32))
    finite = radii.ndim == 1 and radii.size and 0 <= radii[0] <= radii[-1] < np.inf
    if not finite or not attacks:
        raise RequestError(f"evaluate needs attacks and finite epsilons >= 0, got {epsilons}")
    return radii


def run_batches(
    networks: list[LogitsFn],
    data: tuple[np.ndarray, np.ndarray],
    padding: float,
    function: Callable[..., Sequence[jax.Array]],
    rows: np.ndarray,
    *arguments: Any,
    size: int,
    mesh: Mesh,
    name: str,
    quiet: bool = False,
) -> list[np.ndarray]:
    """Run a function on batches of images, and join its outputs.

    Args:
        networks: first argument of the function, on all devices.
        data: images ``[n, ...]`` and labels ``[n, ...]``.
        padding: label of the images that fill a batch; their outputs are dropped.
        function: ``(networks, images, labels, *arguments) -> [outputs [batch, ...], ...]``.
        rows: indices of the images to run on.
        arguments: further arguments of the function.
        size: number of images per batch, a multiple of the number of devices.
        mesh: the devices.
        name: label of the progress bar.
        quiet: show no progress bar.
    """
    images, labels = data
    small = round_up_to_devices(max(size // _SMALL_BATCHES, 1), mesh)
    arguments = replicate(arguments, mesh)

    def dispatched() -> Iterator[tuple[int, Sequence[jax.Array]]]:
        for part, length in _split(rows, size, small):
            x = np.zeros((length, *images.shape[1:]), images.dtype)
            y = np.full((length, *labels.shape[1:]), padding, labels.dtype)
            x[: len(part)], y[: len(part)] = images[part], labels[part]
            own = process_share(length)
            yield len(part), function(networks, *shard((x[own], y[own]), mesh), *arguments)

    results: list[list[np.ndarray]] = []
    options = {"description": name, "total": len(rows), "quiet": quiet}
    for count, outputs in track(in_flight(dispatched(), 1), size=lambda part: part[0], **options):
        results.append([output[:count] for output in to_host(list[Any](outputs))])
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


def round_inward(
    adversarial: Float[Array, "..."], images: Float[Array, "..."]
) -> Float[jax.Array, "..."]:
    """Round adversarial images in [0, 1] to 8-bit levels, towards the original images.

    If the original image has 8-bit levels, the result stays in the ball. If no level lies
    between the two values of a pixel, it is rounded to the nearest level.
    """
    tolerance = 1e-4  # in levels, for the float32 rounding of 8-bit values
    x, origin = (
        jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)) * 255 for x in (adversarial, images)
    )
    inward = jnp.where(x > origin, jnp.floor(x + tolerance), jnp.ceil(x - tolerance))
    between = (inward - x) * (inward - origin) <= tolerance
    return jnp.clip(jnp.where(between, inward, jnp.round(x)), 0, 255) / 255


def _split(rows: np.ndarray, size: int, small: int) -> list[tuple[np.ndarray, int]]:
    """Split rows into full batches and small ones; return each batch with its padded length.

    The small length keeps a few remaining examples from costing as much as a full batch.
    """
    full = len(rows) - len(rows) % size
    tail = rows[full:]
    length = small if len(tail) <= size // 2 else size
    return [
        *((rows[start : start + size], size) for start in range(0, full, size)),
        *((tail[start : start + length], length) for start in range(0, len(tail), length)),
    ]


def _is_correct(network: LogitsFn, images: jax.Array, labels: jax.Array) -> jax.Array:
    return mean_logits(network, images).argmax(-1) == labels


@jax.jit
def _clean(networks: list[LogitsFn], images, labels) -> list[jax.Array]:
    return [_is_correct(network, as_float(images), labels) for network in networks]


@partial(jax.jit, static_argnums=0)
def _attacked(attack: Attack, networks: list[LogitsFn], images, labels, key, epsilon):
    x = as_float(images)
    adversarial = attack(networks[0], x, labels, key, epsilon=epsilon)
    pairs = [(network, adversarial) for network in networks]
    pairs.insert(1, (networks[0], round_inward(adversarial, x).astype(x.dtype)))
    return [_is_correct(network, inputs, labels) for network, inputs in pairs]


def trace_attack(
    attack: Attack, network: LogitsFn, images: Any, labels: Any, key: Any, epsilon: float
) -> jax.stages.Traced:
    """Trace the program in which `evaluate` attacks a batch, to compile it elsewhere.

    Args:
        attack: the attack.
        network: the network, a pytree; like the arrays it may be of shapes with shardings.
        images: ``[batch, ...]``.
        labels: ``[batch]``.
        key: random key.
        epsilon: radius of the ball.
    """
    return _attacked.trace(attack, [network], images, labels, key, epsilon)


def _collect(data: tuple[Array, Array] | Iterable[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "shape"):
        data = [(*data, np.ones(len(data[1]), bool))]
    parts = []
    for images, labels, mask, *_ in data:
        if len(images) != len(labels):
            raise RequestError(f"evaluate: {len(images)} images have {len(labels)} labels")
        selected = np.asarray(mask) & (np.asarray(labels) >= 0)
        parts.append((np.asarray(images)[selected], np.asarray(labels)[selected]))
    if not sum(len(labels) for _, labels in parts):
        raise RequestError("evaluate needs at least one labeled image")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if images.dtype != np.uint8:
        check_images(images, (0.0, 1.0))
    return images, labels.astype(np.int32)
