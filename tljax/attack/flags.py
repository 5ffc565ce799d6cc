"""Reasons not to trust a robust accuracy, found without being asked for."""

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attack.contract import LogitsFn, as_tree, check_classes, check_images
from tljax.attack.losses import ascent, goal, mean_logits
from tljax.runtime.types import Array

_IMAGES = 32  # enough to see a flag, few enough for any network's memory
_CHANGE = 1e-3  # of a logit, relative to the largest: rounding is far below, noise above
_COARSE = {"bf16": 4 * 2.0**-8, "f16": 4 * 2.0**-11}  # the same where a network computes in these


def check_network(logits_fn: LogitsFn, images: Array, labels: Array) -> dict[str, str]:
    """What about a network makes attacks fail for other reasons than robustness.

    Source: the checks that AutoAttack makes (Croce and Hein, 2020) and Athalye et al., "Obfuscated
    gradients give a false sense of security", 2018 (arXiv 1802.00420).

    Args:
        logits_fn: images to logits.
        images: ``[n, ...]`` floating point within [0, 1], of which the first 32 are looked at.
        labels: ``[n]`` int.

    Returns:
        Name of each flag that is raised, and one line that says what it means and what to do:

        * ``randomised``: an image's logits change between calls, or with its neighbours;
        * ``probabilities``: the outputs are not logits but probabilities;
        * ``zero_gradient``: the cross-entropy of some image has no gradient at all;
        * ``few_classes``: too few for the DLR losses.
    """
    network, x, y = as_tree(logits_fn), jnp.asarray(images[:_IMAGES]), jnp.asarray(labels[:_IMAGES])
    check_images(x, (0.0, 1.0))
    check_classes(network, x, y, "labels")
    shape = jax.eval_shape(network, x).shape
    jaxpr = str(jax.make_jaxpr(network)(x))
    tolerance = max([_CHANGE, *(size for name, size in _COARSE.items() if f":{name}[" in jaxpr)])
    n, classes = len(x), shape[-1]
    flags = {}

    # The same images again, in another order, among others: another program, which draws anew.
    logits = np.asarray(_logits(network, x))
    others = np.asarray(_logits(network, jnp.concatenate([x[::-1], 1 - x])))[:n][::-1]
    change = np.abs(others - logits).max()
    if len(shape) == 2 and change > tolerance * max(np.abs(logits).max(), 1e-6):
        flags["randomised"] = (
            f"an image's logits change by up to {change:.2g} between calls or with its neighbours: "
            "turn off training mode, or wrap the network in eot() and use the 'rand' ensemble"
        )
    if (logits >= 0).all() and np.abs(logits.sum(1) - 1).max() < tolerance:
        flags["probabilities"] = (
            "the outputs are probabilities, which flatten the gradients: leave out the softmax"
        )
    none = np.asarray(_no_gradient(network, x, y))
    if none.any():
        flags["zero_gradient"] = (
            f"the cross-entropy of {none.mean():.0%} of the images has no gradient (logits too "
            "large, or masked): rely on the DLR loss and on Square, not on FGSM and PGD"
        )
    if classes < 4:
        flags["few_classes"] = (
            f"{classes} classes are too few for {'any' if classes < 3 else 'the targeted'} DLR "
            "loss: an ensemble uses the margin instead, which large logits mask as little"
        )
    return flags


_logits = jax.jit(mean_logits)


@jax.jit
def _no_gradient(logits_fn: LogitsFn, images: jax.Array, labels: jax.Array) -> jax.Array:
    gradient = ascent(logits_fn, goal("ce", labels).objective, images).gradient
    return jnp.all(gradient == 0, axis=range(1, images.ndim))


def check_outcome(right: dict[str, np.ndarray], *, threshold: float = 0.002) -> dict[str, str]:
    """What the outcomes of the attacks say about each other.

    Args:
        right: for each attack ``[epsilons, n]`` bool, whether the network is still right.
        threshold: the share of the examples that Square may find alone.

    Returns:
        ``square_improves`` with one line if Square fools more than that of what no other did.
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
            f"Square, which uses no gradients, fools {gain:.1%} of the images that attacks by "
            "gradients could not: the network hides its gradients, and is less robust than it looks"
        )
    }
