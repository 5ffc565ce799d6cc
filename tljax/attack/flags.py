"""Automatic checks for gradient masking and other faults of a robustness evaluation."""

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attack.contract import as_partial, check_classes, check_images, check_labels
from tljax.attack.losses import loss_and_gradient, make_goal, mean_logits
from tljax.attack.types import Images, LabelMatrix, Labels, LogitsFn

_IMAGES = 32  # number of images to check, small enough for any network's memory
_TOLERANCE = 1e-3  # change of a logit relative to the largest: above rounding errors, below noise
_LOW_PRECISION = {"bf16": 4 * 2.0**-8, "f16": 4 * 2.0**-11}  # tolerance for networks in 16 bits


def check_network(
    logits_fn: LogitsFn, images: Images, labels: Labels | LabelMatrix
) -> dict[str, str]:
    """Check a network for properties that make attacks fail without robustness.

    Source: the checks of AutoAttack (Croce and Hein, 2020, arXiv 2003.01690) and Athalye et al.,
    "Obfuscated gradients give a false sense of security", 2018 (arXiv 1802.00420).

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        images: ``[batch, ...]`` floating point in [0, 1]; the first 32 are used.
        labels: ``[batch]`` integers, the true classes, or ``[batch, labels]`` of 0, 1 and NaN
            for a network with several labels, which only the flags ``randomized`` and
            ``zero_gradient`` concern.

    Returns:
        The flags by name, each with one line that explains it and says what to do:

        * ``randomized``: the logits of an image differ between calls, or depend on the batch;
        * ``probabilities``: the outputs are probabilities instead of logits;
        * ``zero_gradient``: the gradient of the cross-entropy is 0 for some images;
        * ``few_classes``: there are too few classes for the DLR losses.
    """
    network, x = as_partial(logits_fn), jnp.asarray(images[:_IMAGES])
    y = jnp.asarray(labels[:_IMAGES])
    check_images(x, (0.0, 1.0))
    exclusive = y.ndim == 1
    (check_classes if exclusive else check_labels)(network, x, y, "labels")
    shape = jax.eval_shape(network, x).shape
    jaxpr = str(jax.make_jaxpr(network)(x))
    low_precision = [size for name, size in _LOW_PRECISION.items() if f":{name}[" in jaxpr]
    tolerance = max([_TOLERANCE, *low_precision])
    n, classes = len(x), shape[-1]
    flags = {}

    # Run the same images in another order and a larger batch, with a separately compiled program.
    logits = np.asarray(_logits(network, x))
    others = np.asarray(_logits(network, jnp.concatenate([x[::-1], 1 - x])))[:n][::-1]
    change = np.abs(others - logits).max()
    if len(shape) == 2 and change > tolerance * max(np.abs(logits).max(), 1e-6):
        flags["randomized"] = (
            f"the logits of an image change by up to {change:.2g} between calls or batches: turn "
            "off training mode, or wrap the network in eot() and use the 'rand' ensemble"
        )
    if exclusive and (logits >= 0).all() and np.abs(logits.sum(1) - 1).max() < tolerance:
        flags["probabilities"] = (
            "the outputs are probabilities, which flatten the gradients: remove the softmax"
        )
    zero = np.asarray(_has_zero_gradient(network, x, y))
    zero = zero if exclusive else zero[~np.isnan(np.asarray(y)).all(1)]
    if zero.any() and not exclusive:
        flags["zero_gradient"] = (
            f"the cross-entropy of {zero.mean():.0%} of the images has zero gradient (logits too "
            "large, or masked gradients): the network is less robust than it seems"
        )
    elif zero.any():
        flags["zero_gradient"] = (
            f"the cross-entropy of {zero.mean():.0%} of the images has zero gradient (logits too "
            "large, or masked gradients): rely on the DLR loss and Square, not on FGSM and PGD"
        )
    if exclusive and classes < 4:
        flags["few_classes"] = (
            f"{classes} classes are too few for {'any' if classes < 3 else 'the targeted'} DLR "
            "loss: the ensemble uses the margin loss instead"
        )
    return flags


_logits = jax.jit(mean_logits)


@jax.jit
def _has_zero_gradient(logits_fn: LogitsFn, images: jax.Array, labels: jax.Array) -> jax.Array:
    goal = make_goal("ce" if labels.ndim == 1 else "bce", labels)
    gradient = loss_and_gradient(logits_fn, goal.objective, images).gradient
    return jnp.all(gradient == 0, axis=range(1, images.ndim))


def check_outcome(right: dict[str, np.ndarray], *, threshold: float = 0.002) -> dict[str, str]:
    """Check whether Square succeeds where gradient-based attacks fail, a sign of gradient masking.

    Args:
        right: by attack ``[epsilons, n]`` bool, True where the network resists the attack.
        threshold: largest tolerated fraction of examples that only Square fools.

    Returns:
        ``{"square_improves": explanation}`` if the fraction is larger, otherwise empty.
    """
    others = [value for name, value in right.items() if name != "square"]
    if "square" not in right or not others:
        return {}
    before = np.logical_and.reduce(others)
    gain = (before & ~right["square"]).mean(1).max()
    if gain <= threshold:
        return {}
    return {
        "square_improves": (
            f"Square, which uses no gradients, fools {gain:.1%} of the images that gradient-based "
            "attacks cannot: the network masks its gradients and is less robust than it seems"
        )
    }
