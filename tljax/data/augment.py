"""Augmentation on the device, jitted; what an example gets depends on seed, epoch and example.

A training step begins with ``augment(batch.inputs, batch.indices, epoch_key(seed, epoch), ...)``,
or with that and then `mix`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from tljax.data.options import AugmentConfig
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

OPERATIONS = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
"""What RandAugment draws from."""

# "aug" and "mix" in ASCII: keys that no other consumer of the same seed folds out of it.
_AUGMENT, _MIX = 0x617567, 0x6D6978


def epoch_key(seed: int, epoch: Array | int) -> jax.Array:
    """The key of a pass over the data, for `augment`."""
    # Named, since the default can be changed to one whose draws depend on the batch under vmap.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, _AUGMENT), epoch)


@partial(jax.jit, static_argnames=("size", "config"))
def augment(
    images: Array, indices: Array, key: jax.Array, size: int, config: AugmentConfig
) -> jax.Array:
    """Crops, flips and distorts every image on its own.

    Between the steps pixels are whole levels from 0 to 255, as in Pillow. With everything off it is
    the central crop of `decode`, exactly.

    Args:
        images: ``[batch, side, side, 3]`` uint8; what `decode` makes, best larger than ``size``.
        indices: ``[batch]`` int32 position of each example in its source; -1 for padding. An
            example's result is a function of its image, its index and ``key``, whatever the batch.
        key: of seed and epoch: `epoch_key`.
        size: side of the square that the network sees.
        config: what to do.

    Returns:
        ``[batch, size, size, 3]`` float32 in [0, 1].

    Raises:
        RequestError: the images are not square, or too small for a central crop.
    """
    height, side = images.shape[1:3]
    if height != side or (side < size and not config.crop):
        raise RequestError(f"images of {height} x {side}: need squares of at least {size} pixels")
    offset = round((side - size) / 2)

    def one(image: jax.Array, index: jax.Array) -> jax.Array:
        geometry, distortions = jax.random.split(jax.random.fold_in(key, index))
        draws = jax.random.uniform(geometry, (5,))
        if config.flip:
            image = jnp.where(draws[4] < 0.5, image[:, ::-1], image)
        if config.crop:
            image = _resized_crop(image, _random_box(draws[:4], side, config), size)
        else:
            image = image[offset : offset + size, offset : offset + size]

        def layer(image: jax.Array, draws: jax.Array) -> tuple[jax.Array, None]:
            operation = (draws[0] * len(OPERATIONS)).astype(jnp.int32)
            sign = jnp.where(draws[1] < 0.5, -1, 1)
            return _distort(image, operation, sign * (config.randaugment_magnitude / 30)), None

        if config.randaugment_layers:  # a loop without turns does not run under jax.disable_jit
            # Only a loop keeps XLA from fusing layers and computing the first again per pixel.
            draws = jax.random.uniform(distortions, (config.randaugment_layers, 2))
            image, _ = jax.lax.scan(layer, image, draws)
        return image.astype(jnp.float32) / 255

    return jax.vmap(one)(jnp.asarray(images), jnp.asarray(indices))


@partial(jax.jit, static_argnames="config")
def mix(
    images: Array, targets: Array, mask: Array, key: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
    """Mixes every example with another one of the batch: mixup or CutMix.

    By their nature these depend on the batch: on who is in it and in which order, but not on the
    number of devices that it is spread over. One proportion is drawn per batch, as in both papers.
    Valid rows are mixed with valid rows only, masked rows with themselves.

    Args:
        images: ``[batch, height, width, 3]`` float32 in [0, 1].
        targets: ``[batch, classes]`` float32 probabilities, already smoothed.
        mask: ``[batch]`` bool; False for padding and for images that could not be read.
        key: of seed and step.
        config: the alphas.

    Returns:
        Images and targets, mixed. CutMix's targets follow the area that was really pasted.
    """
    images, targets, mask = jnp.asarray(images), jnp.asarray(targets), jnp.asarray(mask)
    methods = (config.mixup > 0) + (config.cutmix > 0)
    if not methods:
        return images, targets
    pair, method, share, place = jax.random.split(jax.random.fold_in(key, _MIX), 4)

    # Valid rows first: in the order of the batch, and shuffled. Masked rows meet themselves.
    rows = jnp.argsort(~mask, stable=True)
    shuffled = jnp.argsort(jnp.where(mask, jax.random.uniform(pair, mask.shape), 1), stable=True)
    partner = jnp.zeros_like(rows).at[rows].set(shuffled)

    cut = jax.random.bernoulli(method, (config.cutmix > 0) / methods)
    alpha = jnp.where(cut, config.cutmix, config.mixup)
    gammas = jax.random.loggamma(share, alpha, (2,))
    own = jax.nn.sigmoid(gammas[0] - gammas[1])  # Beta(alpha, alpha)
    extent = jnp.asarray(images.shape[1:3])
    center, half = jax.random.uniform(place, (2,)) * extent, jnp.sqrt(1 - own) * extent / 2
    low = jnp.maximum(jnp.round(center - half), 0)
    high = jnp.minimum(jnp.round(center + half), extent)
    y, x = jnp.ogrid[: images.shape[1], : images.shape[2]]
    inside = (y >= low[0]) & (y < high[0]) & (x >= low[1]) & (x < high[1])
    own_pixels = jnp.where(cut, ~inside, own)[:, :, None]
    own = jnp.where(cut, 1 - (high - low).prod() / extent.prod(), own)
    return (
        own_pixels * images + (1 - own_pixels) * images[partner],
        own * targets + (1 - own) * targets[partner],
    )


def _random_box(draws: jax.Array, side: int, config: AugmentConfig) -> jax.Array:
    """Top, left, height and width in pixels, ``[4]`` int32, from four uniform draws.

    Torchvision draws area and ratio up to ten times until the box fits; here the ratio is drawn
    among those that fit, so that the area keeps its uniform distribution.
    """
    area = config.scale[0] + draws[0] * (config.scale[1] - config.scale[0])
    low = jnp.log(jnp.maximum(area, config.ratio[0]))
    high = jnp.log(jnp.minimum(1 / area, config.ratio[1]))
    ratio = jnp.exp(low + draws[1] * (high - low))
    shape = side * jnp.sqrt(jnp.stack([area / ratio, area * ratio]))
    shape = jnp.clip(jnp.round(shape), 1, side)
    corner = jnp.floor(draws[2:] * (side - shape + 1))
    return jnp.concatenate([corner, shape]).astype(jnp.int32)


def _resized_crop(image: jax.Array, box: jax.Array, size: int) -> jax.Array:
    """What Pillow's ``image.crop(box).resize((size, size), BILINEAR)`` does, antialiased.

    The few taps of a pixel are gathered. Two products with weight matrices are four times slower on
    a CPU, and need an explicit precision elsewhere.
    """
    side, (top, left, height, width) = image.shape[0], box

    def taps(start: Array, length: Array) -> tuple[jax.Array, jax.Array]:
        stride = length / size
        support = jnp.maximum(stride, 1)
        centers = start + (jnp.arange(size) + 0.5) * stride
        first = jnp.floor(centers - support + 0.5).astype(jnp.int32)
        positions = first + jnp.arange(math.ceil(2 * max(side / size, 1)))[:, None]
        weights = jnp.maximum(1 - jnp.abs(positions + 0.5 - centers) / support, 0)
        weights = jnp.where((positions >= start) & (positions < start + length), weights, 0)
        return jnp.clip(positions, 0, side - 1), weights / weights.sum(0)

    # Tap by tap: XLA on a CPU takes thirty times longer to sum one gather of all of them.
    rows = pixels = jnp.zeros(())
    for y, weight in zip(*taps(top, height), strict=True):
        rows += image[y] * weight[:, None, None]
    for x, weight in zip(*taps(left, width), strict=True):
        pixels += rows[:, x] * weight[:, None]
    return jnp.round(pixels).astype(jnp.uint8)


def _distort(image: jax.Array, operation: Array, strength: Array) -> jax.Array:
    """One operation of RandAugment, as Pillow does it.

    Magnitudes are those of torchvision; shears leave the upper left corner where it is and what
    enters the image is grey, as in the code of the paper's authors.

    Under vmap a switch would compute all fourteen. They are of three kinds (a blend with a
    degenerate image, a table of levels, a move), and a kind that is not asked for is an identity.
    So each starts from the image that came in, whichever order they are applied in.

    Args:
        image: ``[size, size, 3]`` uint8.
        operation: index into `OPERATIONS`.
        strength: share of the largest magnitude; the sign is a direction, where there are two.
    """
    size = image.shape[0]
    levels = image.astype(jnp.int32)

    def when(name: str, value: Array | float, otherwise: Array | float = 0.0) -> jax.Array:
        return jnp.where(operation == OPERATIONS.index(name), value, otherwise)

    # A blend with, or away from, a degenerate image.
    gray = ((levels * jnp.array([19595, 38470, 7471])).sum(-1, keepdims=True) + 2**15) >> 16
    mean = (gray.sum() + size * size // 2) // (size * size)
    rows = levels[:-2] + levels[1:-1] + levels[2:]
    inner = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * levels[1:-1, 1:-1]
    smooth = levels.at[1:-1, 1:-1].set(jnp.floor(inner / 13 + 0.5).astype(jnp.int32))
    degenerate = when("color", gray, when("contrast", mean, when("sharpness", smooth)))
    enhancements = ("color", "contrast", "brightness", "sharpness")
    factor = 1 + sum(when(name, 0.9 * strength) for name in enhancements)
    blend = jnp.floor(jnp.clip(degenerate + factor * (levels - degenerate), 0, 255))

    # A table of levels for each channel.
    amount, level = jnp.abs(strength), jnp.arange(256)
    channel = 256 * jnp.arange(3)  # where its table begins, in a row of three
    counts = jnp.zeros(3 * 256, jnp.int32).at[levels + channel].add(1).reshape(3, 256)
    low = jnp.argmax(counts > 0, 1, keepdims=True)
    high = 255 - jnp.argmax(counts[:, ::-1] > 0, 1, keepdims=True)
    stretched = jnp.clip((level - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    step = (size * size - jnp.take_along_axis(counts, high, 1)) // 255
    below = jnp.cumsum(counts, 1) - counts
    equal = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    bits = jnp.round(4 * amount).astype(jnp.int32)
    table = when("autocontrast", jnp.where(high > low, stretched, level), level)
    table = when("equalize", jnp.where(step > 0, equal, level), table)
    table = when("solarize", jnp.where(level < 256 * (1 - amount), level, 255 - level), table)
    table = when("posterize", level >> bits << bits, table)
    # The product keeps XLA from fusing the tables into the look-up, which would compute them again
    # for every pixel. Levels are exact in any of its precisions.
    table = (jnp.broadcast_to(table, (3, 256)).astype(jnp.float32) @ jnp.eye(256)).reshape(-1)

    # Another place: where each pixel comes from.
    angle = when("rotate", math.radians(30) * strength)
    origin = when("rotate", size / 2)
    shift = jnp.round(strength * (150 / 331 * size))
    x = jnp.arange(size) + 0.5 - origin
    y = x[:, None]
    from_x = jnp.cos(angle) * x + (when("shear_x", 0.3 * strength) - jnp.sin(angle)) * y
    from_y = jnp.cos(angle) * y + (when("shear_y", 0.3 * strength) + jnp.sin(angle)) * x
    from_x = jnp.floor(from_x + origin + when("translate_x", shift)).astype(jnp.int32)
    from_y = jnp.floor(from_y + origin + when("translate_y", shift)).astype(jnp.int32)
    inside = (from_x >= 0) & (from_x < size) & (from_y >= 0) & (from_y < size)
    source = jnp.where(inside, from_y * size + from_x, 0)

    result = table[blend.astype(jnp.int32) + channel].astype(jnp.uint8)
    return jnp.where(inside[..., None], result.reshape(-1, 3)[source], 128)
