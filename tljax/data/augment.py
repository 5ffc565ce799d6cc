"""Image augmentation on the device, jitted and determined by seed, epoch and example index.

A training step starts with ``augment(batch.inputs, batch.indices, epoch_key(seed, epoch), ...)``,
optionally followed by `mix`. The boxes of random crops are drawn on the host, see
`tljax.data.boxes`; images are cropped there, or by `crop_and_resize`.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key, UInt8

from tljax.data.crop import Interpolation, crop_and_resize
from tljax.data.options import AugmentConfig
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

OPERATIONS = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
"""The operations that RandAugment samples from."""

_Pixels = UInt8[jax.Array, "size size channels"]
"""A square image of one or three channels."""

# "aug" and "mix" in ASCII, folded into the seed so that no other use of it has the same keys.
_AUGMENT, _MIX = 0x617567, 0x6D6978


def epoch_key(seed: int, epoch: Int[Array, ""] | int) -> Key[jax.Array, ""]:
    """Derive the random key of one epoch, for `augment`."""
    # Not the default implementation: users can set it to one whose draws depend on the batch.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, _AUGMENT), epoch)


@partial(jax.jit, static_argnames=("size", "config", "interpolation"))
def augment(
    images: UInt8[Array, "batch height width channels"]
    | Float[Array, "batch height width channels"],
    indices: Int[Array, " batch"],
    key: Key[jax.Array, ""],
    size: int,
    config: AugmentConfig,
    boxes: Float[Array, "batch 7"] | None = None,
    interpolation: Interpolation = "bilinear",
) -> Float[jax.Array, "batch size size channels"]:
    """Flip and distort each image independently, after cropping its box if there are boxes.

    Pixels of 8 bits are integers from 0 to 255 between the steps, as in Pillow.

    Args:
        images: ``[batch, height, width, channels]`` uint8 or float32: images of ``size``, or with
            ``boxes`` whole photographs on a canvas.
        indices: ``[batch]`` int32 position of each example in its source; -1 for padding. The
            result for an example depends on its image, its box, its index and ``key`` only, not on
            the rest of the batch.
        key: random key of the seed and the epoch, from `epoch_key`.
        size: side of the network's square input, in pixels.
        config: the augmentations to apply; its rule for crops is that of `load_batches`, which
            crops images or gives the boxes.
        boxes: ``[batch, 7]`` boxes to crop, in pixels, see `Batch`.
        interpolation: Pillow filter of the crop's resize.

    Returns:
        ``[batch, size, size, channels]`` float32: uint8 in [0, 1], others in their own range.

    Raises:
        RequestError: images without boxes have another size, or RandAugment does not fit their
            channels.
    """
    if boxes is not None:
        images = crop_and_resize(images, boxes, size, interpolation)
    height, width = images.shape[1:3]
    if (height, width) != (size, size):
        raise RequestError(f"images of {height} x {width}: pass boxes, or {size} x {size} pixels")
    if config.randaugment_layers:
        check_randaugment(images.shape[-1], images.dtype)

    def one(image: jax.Array, index: jax.Array) -> jax.Array:
        geometry, distortions = jax.random.split(jax.random.fold_in(key, index))
        if config.flip:
            image = jnp.where(jax.random.bernoulli(geometry), image[:, ::-1], image)

        def layer(image: jax.Array, draws: jax.Array) -> tuple[jax.Array, None]:
            operation = (draws[0] * len(OPERATIONS)).astype(jnp.int32)
            sign = jnp.where(draws[1] < 0.5, -1, 1)
            return _distort(image, operation, sign * (config.randaugment_magnitude / 30)), None

        if config.randaugment_layers:  # jax.disable_jit cannot run a scan of length 0
            # Unrolled, XLA would fuse the layers and recompute the first one for every pixel.
            draws = jax.random.uniform(distortions, (config.randaugment_layers, 2))
            image, _ = jax.lax.scan(layer, image, draws)
        return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image

    return jax.vmap(one)(jnp.asarray(images), jnp.asarray(indices))


def check_randaugment(channels: int, dtype: Any) -> None:
    """Check that RandAugment is defined for images: for gray and RGB of 8 bits.

    Raises:
        RequestError: it is not.
    """
    if channels not in (1, 3) or dtype != "uint8":
        raise RequestError(
            f"--randaugment-layers distorts images of 1 or 3 channels of 8 bits, not of {channels} "
            f"of {dtype}: leave it out"
        )


@partial(jax.jit, static_argnames="config")
def mix(
    images: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    mask: Bool[Array, " batch"],
    key: Key[jax.Array, ""],
    config: AugmentConfig,
) -> tuple[Float[jax.Array, "batch height width channels"], Float[jax.Array, "batch classes"]]:
    """Mix each example with the one before it in the batch, by mixup or CutMix.

    Batches are shuffled, so the one before is any other; devices exchange one image each, and the
    result does not depend on their number. One mixing proportion is drawn per batch, as in both
    papers. The first row and one after a masked row stay unchanged, as masked rows do.

    Source: mixup, Zhang et al. 2017, arXiv:1710.09412; CutMix, Yun et al. 2019, arXiv:1905.04899.

    Args:
        images: ``[batch, height, width, channels]`` float32.
        targets: ``[batch, classes]`` float32 probabilities, with label smoothing already applied.
        mask: ``[batch]`` bool; False for padding and for images that could not be read.
        key: random key of the seed and the step.
        config: the alphas of mixup and CutMix.

    Returns:
        The mixed images and targets, with the shapes of the inputs. CutMix weighs the targets by
        the area that was pasted after the box was clipped to the image.
    """
    images, targets, mask = jnp.asarray(images), jnp.asarray(targets), jnp.asarray(mask)
    methods = (config.mixup > 0) + (config.cutmix > 0)
    if not methods:
        return images, targets
    method_key, weight_key, box_key = jax.random.split(jax.random.fold_in(key, _MIX), 3)

    use_cutmix = jax.random.bernoulli(method_key, (config.cutmix > 0) / methods)
    alpha = jnp.where(use_cutmix, config.cutmix, config.mixup)
    gammas = jax.random.loggamma(weight_key, alpha, (2,))
    weight = jax.nn.sigmoid(gammas[0] - gammas[1])  # Beta(alpha, alpha)
    shape = jnp.asarray(images.shape[1:3])
    center, half = jax.random.uniform(box_key, (2,)) * shape, jnp.sqrt(1 - weight) * shape / 2
    low = jnp.maximum(jnp.round(center - half), 0)
    high = jnp.minimum(jnp.round(center + half), shape)
    y, x = jnp.ogrid[: images.shape[1], : images.shape[2]]
    inside = (y >= low[0]) & (y < high[0]) & (x >= low[1]) & (x < high[1])
    pixel_weight = jnp.where(use_cutmix, ~inside, weight)[:, :, None]
    weight = jnp.where(use_cutmix, 1 - (high - low).prod() / shape.prod(), weight)
    mixed = mask & jnp.roll(mask, 1).at[0].set(False)  # the last row may be padding

    def mix_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = jnp.expand_dims(mixed, range(1, x.ndim))
        return jnp.where(rows, weight * x + (1 - weight) * jnp.roll(x, 1, axis=0), x)

    return mix_rows(images, pixel_weight), mix_rows(targets, weight)


def _distort(image: _Pixels, operation: Array | int, strength: Array | float) -> _Pixels:
    """Apply one operation of RandAugment, as Pillow implements it.

    Magnitudes are those of torchvision. Shears keep the upper left corner fixed, and pixels from
    outside the image are gray, as in the code of the paper's authors.

    Under vmap, a ``switch`` would compute all fourteen operations. They are of three kinds: a blend
    with a degenerate image, a lookup table of levels, and a geometric transform. All three kinds
    are computed, and those that ``operation`` does not belong to are identities.

    Args:
        image: ``[size, size, channels]`` uint8, of one or three channels.
        operation: index into `OPERATIONS`.
        strength: fraction of the largest magnitude, in [-1, 1]; the sign selects the direction of
            operations that have two.
    """
    size, channels = image.shape[0], image.shape[-1]
    levels = image.astype(jnp.int32)

    def when(name: str, value: Array | float, otherwise: Array | float = 0.0) -> jax.Array:
        return jnp.where(operation == OPERATIONS.index(name), value, otherwise)

    # A blend with, or away from, a degenerate image.
    luma = jnp.array([19595, 38470, 7471])
    gray = ((levels * luma).sum(-1, keepdims=True) + 2**15) >> 16  # of one channel, itself
    mean = (gray.sum() + size * size // 2) // (size * size)
    rows = levels[:-2] + levels[1:-1] + levels[2:]
    inner = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * levels[1:-1, 1:-1]
    smooth = levels.at[1:-1, 1:-1].set(jnp.floor(inner / 13 + 0.5).astype(jnp.int32))
    degenerate = when("color", gray, when("contrast", mean, when("sharpness", smooth)))
    enhancements = ("color", "contrast", "brightness", "sharpness")
    factor = 1 + sum(when(name, 0.9 * strength) for name in enhancements)
    blend = jnp.floor(jnp.clip(degenerate + factor * (levels - degenerate), 0, 255))

    # A lookup table of levels for each channel.
    amount, level = jnp.abs(strength), jnp.arange(256)
    channel = 256 * jnp.arange(channels)  # offset of each channel's table
    counts = jnp.zeros(channels * 256, jnp.int32).at[levels + channel].add(1)
    counts = counts.reshape(channels, 256)
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
    # The matrix product keeps XLA from fusing the tables into the lookup, which would recompute
    # them for every pixel. Levels are exact in every matmul precision.
    table = (jnp.broadcast_to(table, (channels, 256)).astype(jnp.float32) @ jnp.eye(256)).reshape(
        -1
    )

    # A geometric transform: the position that each pixel is read from.
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

    # `jax.scipy.ndimage.map_coordinates` gives the same pixels in 1.12 times the time of `augment`.
    result = table[blend.astype(jnp.int32) + channel].astype(jnp.uint8)
    return jnp.where(inside[..., None], result.reshape(-1, channels)[source], 128)
