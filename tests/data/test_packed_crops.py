"""Packed photographs are cropped as their files are: the same boxes, and nearly the same pixels."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from test_decode import encode
from test_packed import packed_of, source_of

from tljax.data.augment import augment, epoch_key
from tljax.data.boxes import Crops
from tljax.data.examples import Source, select
from tljax.data.loader import load_batches
from tljax.data.options import AugmentConfig
from tljax.data.packed import Packed
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.types import Batch

SIZE = Preprocess(size=24, resize=32)
SHAPES = [(80, 60), (60, 80), (64, 64), (200, 60), (60, 170), (33, 47)]
CONFIG = AugmentConfig(flip=False)


PHOTOGRAPH = Image.fromarray(skimage.data.chelsea())
FILES: list[bytes | np.ndarray] = [
    encode(PHOTOGRAPH.resize(size), "JPEG", quality=95) for size in SHAPES
]


def packed_source(folder: Path, files: list[bytes | np.ndarray], **options: str) -> Source:
    packed = packed_of(folder, files, size=64, **options)
    labels, names = np.zeros(len(packed), np.int32), [f"{i}" for i in range(len(packed))]
    # The training part; the validation part follows.
    return select(Source(packed, labels, ("a",), names), np.arange(len(files)))


def cropped(source: Source, workers: int = 0, config: AugmentConfig = CONFIG) -> np.ndarray:
    crops = Crops(3, 5, config)
    batches = load_batches(source, SIZE, batch_size=4, seed=1, crops=crops, workers=workers)
    parts = [(batch.indices, pixels(batch, config)) for batch in batches]
    indices, images = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images[[indices.tolist().index(i) for i in range(len(source))]]


def pixels(batch: Batch, config: AugmentConfig) -> np.ndarray:
    key = epoch_key(0, 1)
    images = augment(batch.inputs, batch.indices, key, SIZE.size, config, batch.boxes)
    return np.asarray(images) * 255


@pytest.mark.parametrize("crop", ["random-resized", "random"])
@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_crops_of_packed_photographs_show_the_same_as_those_of_files(tmp_path, crop, encoding):
    config = AugmentConfig(flip=False, crop=crop)
    difference = cropped(packed_source(tmp_path, FILES, encoding=encoding), config=config)
    difference -= cropped(source_of(FILES), config=config)
    assert np.abs(difference).mean((1, 2, 3)).max() < 4


def test_the_device_crops_whole_packed_photographs(tmp_path):
    source = packed_source(tmp_path, FILES)
    crops = Crops(3, 5, CONFIG)
    batch = next(load_batches(source, SIZE, batch_size=8, seed=1, crops=crops))
    rows, height, width, channels = batch.inputs.shape
    assert (rows, height, channels) == (8, 64, 3)
    assert 2 * 64 - 4 < width <= 2 * 64  # as wide as the widest
    assert batch.boxes is not None
    assert batch.boxes.shape == (8, 7)
    examples = source.locate()[0]
    assert isinstance(examples, Packed)
    for row, index in enumerate(batch.indices):
        if index < 0:
            assert not batch.inputs[row].any()
            continue
        stored = np.asarray(examples[index])
        transposed = stored.shape[0] > stored.shape[1]
        assert batch.boxes[row, 6] == transposed
        stored = stored.swapaxes(0, 1) if transposed else stored
        np.testing.assert_array_equal(batch.inputs[row, :, : stored.shape[1]], stored)
        assert not batch.inputs[row, :, stored.shape[1] :].any()


def test_the_host_and_the_device_crop_the_same_box_to_within_a_level(tmp_path, monkeypatch):
    source = packed_source(tmp_path, FILES)
    device = cropped(source)
    monkeypatch.setattr(Packed, "canvas", None)
    host = cropped(source)
    upright = [i for i, (width, height) in enumerate(SHAPES) if width >= height]
    assert np.abs(device - host)[upright].max() <= 1.001
    # Of portraits the device resizes the height first.
    assert np.abs(device - host).mean() < 0.1


def test_an_unreadable_photograph_is_masked(tmp_path):
    source = packed_source(tmp_path, [*FILES[:2], b"no image", *FILES[3:]])
    skipped: dict[int, str] = {}
    crops = Crops(3, 5, CONFIG)
    batch = next(load_batches(source, SIZE, batch_size=6, crops=crops, skipped=skipped))
    assert skipped == {2: "text, not an image"}
    assert batch.mask.tolist() == [True, True, False, True, True, True]
    assert np.isfinite(pixels(batch, CONFIG)).all()


@pytest.mark.parametrize("crops", [None, Crops(3, 5, CONFIG)])
def test_workers_copy_the_same_pixels(tmp_path, crops):
    source = packed_source(tmp_path, FILES)
    for shard in ((0, 1), (1, 2)):
        here, there = (
            [*load_batches(source, SIZE, batch_size=4, crops=crops, workers=n, shard=shard)]
            for n in (0, 2)
        )
        for a, b in zip(here, there, strict=True):
            np.testing.assert_array_equal(a.inputs, b.inputs)
            np.testing.assert_array_equal(a.boxes, b.boxes)
