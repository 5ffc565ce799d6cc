"""Augmentation depends on seed, epoch and example only, and equals Pillow."""

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from tljax.data.augment import (
    OPERATIONS,
    AugmentConfig,
    _distort,
    augment,
    epoch_key,
    mix,
)
from tljax.data.boxes import Crops, pixel_boxes
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess

pytestmark = pytest.mark.usefixtures("quick_to_compile")

OFF = AugmentConfig(crop="center", flip=False)
ALL = AugmentConfig(randaugment_layers=2)
KEY = epoch_key(0, 0)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), np.uint8)
INDICES = np.array([3, 11, 0, -1, 7, 1000], np.int32)
SHAPES = np.full((6, 2), 20)
BOXES = pixel_boxes(Crops(0, 0, ALL).boxes(INDICES, SHAPES, Preprocess()), SHAPES)

distort = jax.jit(_distort)


def levels(images: jax.Array) -> np.ndarray:
    """Convert float images to integer levels, checking that they are exact."""
    exact = np.asarray(images) * 255
    np.testing.assert_allclose(exact, exact.round(), atol=1e-4)
    return exact.round().astype(np.uint8)


def test_an_example_does_not_depend_on_its_batch():
    whole = np.asarray(augment(IMAGES, INDICES, KEY, 16, ALL, BOXES))
    assert whole.shape == (6, 16, 16, 3)
    assert whole.dtype == np.float32
    for rows in ([5, 4, 3, 2, 1, 0], [2, 2, 0, 1, 2, 3], [4]):
        part = np.asarray(augment(IMAGES[rows], INDICES[rows], KEY, 16, ALL, BOXES[rows]))
        assert part.tobytes() == whole[rows].tobytes()
    assert (augment(IMAGES, INDICES[::-1], KEY, 16, ALL, BOXES) != whole).any((1, 2, 3)).all()


def test_an_example_does_not_depend_on_the_number_of_devices():
    program = """
import sys
from tests.data import test_augment as t
from tljax.runtime.parallel import data_mesh, shard
batch = shard((t.IMAGES, t.INDICES, t.BOXES), data_mesh())
sys.stdout.buffer.write(t.np.asarray(t.augment(*batch[:2], t.KEY, 16, t.ALL, batch[2])).tobytes())
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | flags,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert done.stdout == np.asarray(augment(IMAGES, INDICES, KEY, 16, ALL, BOXES)).tobytes()


def test_seeds_and_epochs_differ():
    keys = [epoch_key(seed, epoch) for seed in range(2) for epoch in range(3)]
    arrays = IMAGES[:1], INDICES[:1]
    results = [np.asarray(augment(*arrays, key, 16, ALL, BOXES[:1])) for key in keys]
    assert len({result.tobytes() for result in results}) == 6
    # A run resumed with a later version must see the same augmentations.
    assert jax.random.key_data(epoch_key(3, 4)).tolist() == [2514142082, 2772707869]


def test_the_key_is_threefry_whatever_the_default():
    expected = jax.random.key_data(epoch_key(1, 2))
    with jax.default_prng_impl("rbg"):
        assert jax.random.key_data(epoch_key(1, 2)).tolist() == expected.tolist()


def test_jit_does_not_change_the_result():
    with jax.disable_jit():  # without RandAugment, which takes a minute without jit
        plain = augment(IMAGES[:1], INDICES[:1], KEY, 16, AugmentConfig(), BOXES[:1])
    compiled = augment(IMAGES[:1], INDICES[:1], KEY, 16, AugmentConfig(), BOXES[:1])
    np.testing.assert_array_equal(levels(plain), levels(compiled))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), kind=st.sampled_from(["noise", "black", "white", "two"]))
def test_values_stay_between_0_and_1(seed, kind):
    high = {"noise": 256, "black": 1, "white": 1, "two": 2}[kind]
    images = np.random.default_rng(seed).integers(0, high, IMAGES.shape).astype(np.uint8)
    images = 255 - images if kind == "white" else images
    config = AugmentConfig(randaugment_layers=2, randaugment_magnitude=30, mixup=0.2, cutmix=1)
    result = augment(images, INDICES, epoch_key(seed, 0), 16, config, BOXES)
    mixed, _ = mix(result, np.eye(6), INDICES >= 0, jax.random.key(seed), config)
    for values in (result, mixed):
        assert np.isfinite(values).all()
        assert values.min() >= 0
        assert values.max() <= 1


def test_without_augmentation_levels_become_values():
    # Compiled, since XLA rounds a division by 255 differently from numpy.
    expected = jax.jit(lambda levels: levels.astype(jnp.float32) / 255)(IMAGES)
    np.testing.assert_array_equal(augment(IMAGES, INDICES, KEY, 20, OFF), expected)


def test_half_of_the_images_are_flipped():
    n = 2000
    images = IMAGES[:1].repeat(n, 0)
    result = levels(augment(images, np.arange(n), KEY, 20, AugmentConfig()))
    flipped = (result == IMAGES[0, :, ::-1]).all((1, 2, 3))
    assert (flipped | (result == IMAGES[0]).all((1, 2, 3))).all()
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(n)


def test_a_flipped_crop_is_the_mirror_image_of_the_crop():
    plain, flipped = (
        np.asarray(augment(IMAGES, INDICES, KEY, 16, AugmentConfig(flip=flip), BOXES))
        for flip in (False, True)
    )
    turned = (flipped != plain).any((1, 2, 3))
    assert 0 < turned.sum() < 6
    np.testing.assert_array_equal(flipped[turned], plain[turned, :, ::-1])


STRENGTHS = [-1.0, -0.7, -0.3, 0.0, 0.3, 0.7, 1.0]
PHOTO = np.asarray(Image.fromarray(IMAGES[0]).resize((64, 64), Image.Resampling.BICUBIC))
DIM = (PHOTO // 3 + [10, 50, 100]).astype(np.uint8)  # low contrast, for autocontrast
FLAT = np.full((64, 64, 3), [0, 100, 255], np.uint8)
SPARSE = np.where(np.arange(64 * 64).reshape(64, 64, 1) < 9, PHOTO, 7)  # equalize does nothing


def pillow(name: str, image: Image.Image, strength: float) -> Image.Image:
    """Apply one operation at a fraction of torchvision's largest magnitude."""
    factor = 1 + 0.9 * strength
    options = {"resample": Image.Resampling.NEAREST, "fillcolor": (128, 128, 128)}
    shift = round(strength * 150 / 331 * image.width)

    def affine(*coefficients: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, **options)

    return {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "rotate": lambda: image.rotate(30 * strength, **options),
        "solarize": lambda: ImageOps.solarize(image, 256 * (1 - abs(strength))),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "shear_x": lambda: affine(1, 0.3 * strength, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * strength, 1, 0),
        "translate_x": lambda: affine(1, 0, shift, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, shift),
    }[name]()


EXACT = {"identity", "equalize", "solarize", "posterize", "translate_x", "translate_y"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pillow(name):
    changed = 0
    for image in (PHOTO, DIM, FLAT, SPARSE):
        for strength in STRENGTHS:
            expected = np.asarray(pillow(name, Image.fromarray(image), strength), int)
            result = np.asarray(distort(image, OPERATIONS.index(name), strength), int)
            changed += (result != image).any()
            difference = abs(result - expected)
            if name in EXACT:
                assert difference.max() == 0
            elif name == "rotate" or name.startswith("shear"):
                # Pillow uses steps of 1/65536 pixel and may read a neighboring pixel.
                assert (difference > 0).mean() < 0.005
            else:
                assert difference.max() <= 1  # Pillow truncates; rounding errors can cross a level
    assert (changed > 0) == (name != "identity")


def outcomes(image: np.ndarray, strength: float) -> dict[bytes, tuple[np.ndarray, int]]:
    """Compute the possible results of one layer and how many of 28 equal draws give each."""
    results: dict[bytes, tuple[np.ndarray, int]] = {}
    for operation in range(len(OPERATIONS)):
        for signed in (strength, -strength):
            result = np.asarray(distort(image, operation, signed))
            _, draws = results.get(result.tobytes(), (result, 0))
            results[result.tobytes()] = result, draws + 1
    return results


def randaugmented(n: int, layers: int) -> list[bytes]:
    """Augment one image with n different indices, at strength 0.7."""
    config = AugmentConfig(flip=False, randaugment_layers=layers, randaugment_magnitude=21)
    results = levels(augment(np.stack([DIM] * n), np.arange(n), KEY, 64, config))
    return [result.tobytes() for result in results]


def test_randaugment_draws_every_operation_in_both_directions():
    n, expected = 2000, outcomes(DIM, 0.7)
    counts = dict.fromkeys(expected, 0)
    for result in randaugmented(n, 1):
        counts[result] += 1
    assert len(expected) == 14 + 9  # nine operations have two directions
    for result, (_, number) in expected.items():
        share = number / 28
        assert abs(counts[result] / n - share) < 5 * math.sqrt(share / n)


def test_randaugment_layers_are_applied_one_after_another():
    once = outcomes(DIM, 0.7)
    twice = {result for image, _ in once.values() for result in outcomes(image, 0.7)}
    results = randaugmented(100, 2)
    assert set(results) <= twice
    assert sum(result in once for result in results) < 50


# All pixels of row i are i / 10, so that the rows a mixed row consists of can be identified.
ROWS = 7
PLAIN = (np.arange(ROWS, dtype=np.float32)[:, None, None, None] / 10).repeat(12, 1).repeat(16, 2)
PLAIN = PLAIN.repeat(3, 3)
TARGETS = np.eye(ROWS, dtype=np.float32)
MASK = np.array([1, 0, 1, 1, 0, 1, 1], bool)
FULL = np.ones(ROWS, bool)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_equals_its_formula(seed):
    images, targets = map(
        np.asarray, mix(PLAIN, TARGETS, FULL, jax.random.key(seed), AugmentConfig(mixup=1.0))
    )
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(images, np.einsum("ij,jhwc->ihwc", targets, PLAIN), atol=1e-6)
    own = np.diagonal(targets)
    assert len({round(float(share), 5) for share in own if share < 1}) == 1  # one for the batch
    others = targets - np.diag(own)
    assert not others[0].any()
    assert others[1:].argmax(1).tolist() == [*range(ROWS - 1)]


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_pastes_one_box_and_weighs_the_targets_by_its_area(seed):
    images, targets = map(
        np.asarray, mix(PLAIN, TARGETS, FULL, jax.random.key(seed), AugmentConfig(cutmix=1.0))
    )
    boxes = set()
    for row in range(ROWS):
        partner = int((targets[row] - TARGETS[row]).argmax())
        pasted = (images[row] != PLAIN[row]).all(-1)
        np.testing.assert_array_equal(images[row][~pasted], PLAIN[row][~pasted])
        if partner == row or not pasted.any():
            assert not pasted.any()
            continue
        assert (images[row][pasted] == PLAIN[partner, 0, 0]).all()
        assert targets[row, partner] == pytest.approx(pasted.mean(), abs=1e-7)
        assert targets[row].sum() == pytest.approx(1, abs=1e-6)
        y, x = np.nonzero(pasted)
        assert pasted.sum() == (np.ptp(y) + 1) * (np.ptp(x) + 1)  # a filled rectangle
        boxes.add((y.min(), x.min(), y.max(), x.max()))
    assert len(boxes) == 1


@cache
def own_shares(mixup: float, cutmix: float, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of the original examples in n batches, and which batches used CutMix."""
    config = AugmentConfig(mixup=mixup, cutmix=cutmix)
    images, targets = np.zeros((2, 16, 16, 3), np.float32), np.eye(2, dtype=np.float32)
    images[1] = 1
    run = jax.vmap(lambda key: mix(images, targets, np.ones(2, bool), key, config))
    mixed, labels = map(np.asarray, run(jax.random.split(KEY, n)))
    mixed, own = mixed[:, 1], labels[:, 1, 1]
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), own, atol=1e-5)
    return own, np.isin(mixed, (0, 1)).all((1, 2, 3))


@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_mixing_weights_follow_a_beta_distribution(alpha):
    own, _ = own_shares(alpha, 0)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(own.mean() - 0.5) < 5 * math.sqrt(variance / len(own))
    assert own.var() == pytest.approx(variance, rel=0.3)


def test_mixup_and_cutmix_are_each_used_for_half_of_the_batches():
    _, cut = own_shares(5.0, 5.0)
    assert abs(cut.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(cut))
    assert not own_shares(5.0, 0)[1].any()


@pytest.mark.parametrize("config", [AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0)])
def test_masked_rows_do_not_affect_valid_rows(config):
    mixed = set()
    for seed in range(30):
        images, targets = mix(PLAIN, TARGETS, MASK, jax.random.key(seed), config)
        poisoned = np.where(MASK[:, None, None, None], PLAIN, 0.95)
        again, labels = mix(poisoned, TARGETS, MASK, jax.random.key(seed), config)
        np.testing.assert_array_equal(images[MASK], again[MASK])
        np.testing.assert_allclose(again[~MASK], poisoned[~MASK], atol=1e-6)
        np.testing.assert_array_equal(labels, targets)
        assert not np.asarray(targets)[MASK][:, ~MASK].any()
        np.testing.assert_allclose(targets[~MASK], TARGETS[~MASK], atol=1e-6)
        mixed |= set(zip(*np.nonzero(np.asarray(targets)), strict=True))
    # A row is mixed with the one before it if both are valid.
    pairs = {(row, row - 1) for row in range(1, ROWS) if MASK[row] and MASK[row - 1]}
    assert mixed == {(row, row) for row in range(ROWS)} | pairs


@pytest.mark.parametrize("valid", [0, 1])
def test_batches_with_fewer_than_two_valid_rows_are_unchanged(valid):
    mask = np.arange(ROWS) < valid
    config = AugmentConfig(mixup=1.0)
    images, targets = mix(PLAIN, TARGETS, mask, jax.random.key(0), config)
    np.testing.assert_allclose(images, PLAIN, atol=1e-7)
    np.testing.assert_allclose(targets, TARGETS, atol=1e-7)


def test_without_mixing_the_batch_is_unchanged():
    images, targets = mix(PLAIN, TARGETS, MASK, jax.random.key(0), ALL)
    np.testing.assert_array_equal(images, PLAIN)
    np.testing.assert_array_equal(targets, TARGETS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0, 1)}, "scale"),
        ({"scale": (0.5, 1.1)}, "scale"),
        ({"scale": (0.5, 0.4)}, "scale"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"ratio": (1.1, 2)}, "ratio"),
        ({"ratio": (0.5, 0.9)}, "ratio"),
        ({"randaugment_magnitude": 31}, "magnitude 31"),
        ({"randaugment_magnitude": -1}, "magnitude -1"),
        ({"randaugment_layers": -1}, "layers"),
        ({"mixup": -0.1}, "mixup"),
        ({"cutmix": -0.1}, "cutmix"),
        ({"crop": False}, "--crop False: choose random-resized, random, center"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        AugmentConfig(**options)


def test_images_of_another_size_are_refused_without_boxes():
    for size in (16, 21):
        with pytest.raises(RequestError, match=f"20 x 20: pass boxes, or {size} x {size} pixels"):
            augment(IMAGES, INDICES, KEY, size, OFF)
    with pytest.raises(RequestError, match="20 x 19"):
        augment(IMAGES[:, :, :19], INDICES, KEY, 20, ALL)


# --- other channels -------------------------------------------------------------------------------


def test_every_channel_is_cropped_and_flipped_alike():
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 13), np.uint8)
    config = AugmentConfig()
    whole = augment(images, INDICES, KEY, 16, config, BOXES)
    for channel in (0, 5, 12):
        alone = augment(images[..., [channel]], INDICES, KEY, 16, config, BOXES)
        np.testing.assert_array_equal(whole[..., [channel]], alone)


def test_numbers_of_more_than_8_bits_are_not_rounded():
    values = np.random.default_rng(0).normal(3, 7, (6, 20, 20, 4)).astype(np.float32)
    np.testing.assert_array_equal(augment(values, INDICES, KEY, 20, OFF), values)
    exact = augment(IMAGES.astype(np.float32), INDICES, KEY, 16, AugmentConfig(), BOXES)
    rounded = levels(augment(IMAGES, INDICES, KEY, 16, AugmentConfig(), BOXES))
    assert 0.1 < np.abs(exact - rounded).max() <= 1 + 1e-4  # of two roundings


@pytest.mark.slow
def test_gray_images_are_distorted_as_their_copies_in_rgb():
    gray = IMAGES[..., :1]
    expected = augment(gray.repeat(3, -1), INDICES, KEY, 16, ALL, BOXES)
    np.testing.assert_array_equal(augment(gray, INDICES, KEY, 16, ALL, BOXES), expected[..., :1])


@pytest.mark.parametrize(("channels", "dtype"), [(4, np.uint8), (3, np.float32)])
def test_distortions_of_other_images_are_refused(channels: int, dtype: type):
    images = np.zeros((6, 20, 20, channels), dtype)
    with pytest.raises(RequestError, match=f"1 or 3 channels of 8 bits, not of {channels} of "):
        augment(images, INDICES, KEY, 20, ALL)
