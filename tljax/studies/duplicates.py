"""Find validation images that duplicate training images: the same pixels or the same photograph.

Images from the web occur repeatedly: saved again as JPEG, resized, cropped or mirrored. Accuracy
on such validation images is too high (Barz and Denzler 2020, "Do we train on test data? Purging
CIFAR of near-duplicates", https://arxiv.org/abs/1902.00423).

Images are compared by the normalized horizontal and vertical differences of gray thumbnails, that
is by a difference hash that keeps its magnitudes. In a first pass, 8 x 8 differences of whole
images are compared with those of a dozen crops, for all pairs at once, by matrix products. In a
second pass, the crop of the few most similar pairs is fitted to maximize the similarity of their
16 x 16 differences.

Measured on the 3,268 photographs of hymenoptera, pets37, cats_dogs and an ImageNet sample: none of
the 5.3 million pairs of different photographs is more similar than 0.81. Of 1,634 copies, cropped
at random, half of them mirrored, resized and saved again as JPEG, all are found if the crop keeps
at least 90% of each side, 99% at 80% and 77% at 70%, and none is matched with another photograph.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from tljax.data.examples import Examples
from tljax.data.pictures import open_picture
from tljax.runtime.errors import UnreadableImageError
from tljax.runtime.files import sha256

THRESHOLD = 0.9
"""Similarity from which two images count as the same photograph; see the module's docstring."""

SMALLEST = 32
"""Short side, in pixels, below which only identical pixels count: small images look alike."""

_THUMBNAIL = 64  # pixels per side
_COARSE, _FINE = 8, 16  # differences per side
_COARSE_THRESHOLD = 0.75
_CANDIDATES = 8  # pairs per validation image in the second pass
_BLOCK = 1024  # training images compared at once
_SMALLEST_CROP = 0.6  # share of a side

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge as shares of the sides."""

# Crops that are compared with the whole of the other image; None is the central square.
_WHOLE = (0.0, 0.0, 1.0, 1.0)
_VIEWS: tuple[Box | None, ...] = (
    _WHOLE,
    (0.05, 0.05, 0.95, 0.95),
    (0.1, 0.1, 0.9, 0.9),
    *((x, y, x + 0.9, y + 0.9) for x in (0, 0.1) for y in (0, 0.1)),
    (0.0, 0.0, 0.9, 1.0),
    (0.1, 0.0, 1.0, 1.0),
    (0.0, 0.0, 1.0, 0.9),
    (0.0, 0.1, 1.0, 1.0),
    None,
)


class Duplicate(NamedTuple):
    """A validation image that duplicates a training image.

    Attributes:
        train: position of the most similar training image.
        val: position of the validation image.
        kind: ``exact`` for the same pixels, ``near`` for the same photograph, ``mirrored`` for its
            mirror image.
        similarity: cosine similarity of the fitted differences, at most 1; 1 for ``exact``.
    """

    train: int
    val: int
    kind: Literal["exact", "near", "mirrored"]
    similarity: float


def find_duplicates(
    train: Examples, val: Examples, *, threshold: float = THRESHOLD
) -> list[Duplicate]:
    """Find the validation images that duplicate a training image.

    Copies are found despite JPEG compression, resizing, changes of brightness, contrast and aspect
    ratio, conversion to gray, mirroring, and crops that keep about 80% of each side, but not
    rotation. Similar frames of one video count as copies. Unreadable images are left out; an image
    without structure, such as a blank page, has exact duplicates only.

    It takes 4 KiB of memory per training image and 18 KiB per validation image of any size.

    Args:
        train: training images: encoded files or uint8 RGB pixels, such as
            `tljax.data.sources.Source.examples` or an array ``[n, height, width, 3]``.
        val: validation images, likewise.
        threshold: similarity, in (0.75, 1], from which two images count as the same photograph.

    Returns:
        One entry per duplicated validation image, in order, with the most similar training image.
    """
    train_images, val_images = _summarize(train), _summarize(val)
    first: dict[str, int] = {}
    for i, digest in enumerate(train_images.digests):
        first.setdefault(digest, i)
    duplicates = {
        j: Duplicate(first[digest], j, "exact", 1.0)
        for j, digest in enumerate(val_images.digests)
        if digest and digest in first
    }
    rest = [j for j in _comparable(val_images) if j not in duplicates]
    for pair in _similar_pairs(train_images, _comparable(train_images), val_images, rest):
        similarity = max(_fit_crop(*fit) for fit in pair.fits)
        j = pair.val
        new = j not in duplicates
        if similarity >= threshold and (new or similarity > duplicates[j].similarity):
            kind = "mirrored" if pair.mirrored else "near"
            duplicates[j] = Duplicate(pair.train, j, kind, similarity)
    return [duplicates[j] for j in sorted(duplicates)]


class _Summary(NamedTuple):
    """Digests and thumbnails of images.

    Attributes:
        digests: SHA-256 of the pixels; "" for an unreadable image.
        thumbnails: ``[n, side, side]`` uint8 gray, resized to a square.
        sizes: ``[n, 2]`` width and height of the image in pixels; 0 for an unreadable image.
    """

    digests: list[str]
    thumbnails: np.ndarray
    sizes: np.ndarray


def _summarize(examples: Examples) -> _Summary:
    thumbnails = np.zeros((len(examples), _THUMBNAIL, _THUMBNAIL), np.uint8)
    sizes = np.zeros((len(examples), 2), np.int32)

    def summarize(index: int) -> str:
        try:
            image = open_picture(examples[index])
        except UnreadableImageError:
            return ""
        gray = image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
        thumbnails[index], sizes[index] = np.asarray(gray), image.size
        return sha256(repr(image.size).encode() + image.tobytes())

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(summarize, range(len(examples))))
    return _Summary(digests, thumbnails, sizes)


def _comparable(images: _Summary) -> list[int]:
    """Return the positions of images that are large enough to compare."""
    return np.flatnonzero(images.sizes.min(1, initial=SMALLEST) >= SMALLEST).tolist()


class _Pair(NamedTuple):
    """Two images that may be duplicates.

    Attributes:
        train: position of the training image.
        val: position of the validation image.
        mirrored: whether the validation image is mirrored.
        fits: (thumbnail, crop, other thumbnail), where the crop may show the other image; with the
            training image first, and with the validation image first.
    """

    train: int
    val: int
    mirrored: bool
    fits: list[tuple[np.ndarray, Box, np.ndarray]]


def _similar_pairs(
    train: _Summary, train_rows: Sequence[int], val: _Summary, val_rows: Sequence[int]
) -> Iterator[_Pair]:
    """Yield, for each validation image, its pairs with the few most similar training images."""
    upright = val.thumbnails[val_rows]
    orientations = (upright, upright[:, :, ::-1])
    val_views = [_describe(thumbnails, val.sizes[val_rows]) for thumbnails in orientations]
    best = np.full((_CANDIDATES, len(val_rows)), -1, np.float32)
    indices = np.zeros(best.shape, np.int32)
    for start in range(0, len(train_rows), _BLOCK):
        block = np.asarray(train_rows[start : start + _BLOCK])
        train_views = _describe(train.thumbnails[block], train.sizes[block])
        similarity = np.full((len(block), len(val_rows)), -1, np.float32)
        product = np.empty_like(similarity)
        for views in val_views:
            # Either image may be a crop of the other: compare views of one with the whole other.
            compared = [(view, views[0]) for view in train_views]
            compared += [(train_views[0], view) for view in views[1:]]
            for train_view, val_view in compared:
                np.matmul(train_view, val_view.T, out=product)
                np.maximum(similarity, product, out=similarity)
        best = np.concatenate([best, similarity])
        indices = np.concatenate([indices, np.broadcast_to(block[:, None], similarity.shape)])
        top = np.argpartition(-best, _CANDIDATES - 1, axis=0)[:_CANDIDATES]
        best, indices = (np.take_along_axis(x, top, axis=0) for x in (best, indices))

    for rank, column in np.argwhere(best > _COARSE_THRESHOLD):
        i, j = int(indices[rank, column]), int(val_rows[column])
        train_views = _describe(train.thumbnails[[i]], train.sizes[[i]])[:, 0]
        train_cropped = np.stack([train_views @ views[0, column] for views in val_views])
        val_cropped = np.stack([views[:, column] @ train_views[0] for views in val_views])
        mirrored = int(np.maximum(train_cropped, val_cropped).max(1).argmax())
        a, b = train.thumbnails[i], orientations[mirrored][column]
        crop_of_a = _box(_VIEWS[train_cropped[mirrored].argmax()], train.sizes[i])
        crop_of_b = _box(_VIEWS[val_cropped[mirrored].argmax()], val.sizes[j])
        yield _Pair(i, j, bool(mirrored), [(a, crop_of_a, b), (b, crop_of_b, a)])


def _box(view: Box | None, size: np.ndarray) -> Box:
    """Return the edges of a view of an image of the given width and height."""
    if view is not None:
        return view
    x, y = (1 - size.min() / size) / 2
    return x, y, 1 - x, 1 - y


def _describe(
    thumbnails: UInt8[np.ndarray, "n side side"], sizes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, "views n differences"]:
    """Return the normalized coarse differences of all views of each image."""
    differences = np.empty((len(_VIEWS), len(sizes), 2 * _COARSE**2), np.float32)
    for v, view in enumerate(_VIEWS):
        for k, size in enumerate(sizes):
            differences[v, k] = _differences(thumbnails[k], _box(view, size), _COARSE)
    return differences


def _differences(
    thumbnail: UInt8[np.ndarray, "side side"], box: Sequence[float], side: int
) -> Float[np.ndarray, " differences"]:
    """Return ``2 * side * side`` normalized differences of neighboring pixels of a crop."""
    # In floating point: eight bits would round away the differences of a low-contrast image.
    image = Image.fromarray(thumbnail.astype(np.float32))
    left, top, right, bottom = (_THUMBNAIL * edge for edge in box)
    small = np.asarray(
        image.resize((side + 1, side + 1), Image.Resampling.BILINEAR, (left, top, right, bottom))
    )
    corner = small[1:, 1:]
    differences = np.stack([corner - small[1:, :-1], corner - small[:-1, 1:]]).ravel()
    # Half a gray level on average is noise of compression rather than structure.
    return differences / max(float(np.linalg.norm(differences)), 0.5 * differences.size**0.5)


def _fit_crop(cropped: np.ndarray, start: Box, whole: np.ndarray) -> float:
    """Return the highest cosine of the fine differences that moving the crop's edges reaches."""
    target = _differences(whole, _WHOLE, _FINE)
    box: Sequence[float] = start
    best = float(_differences(cropped, box, _FINE) @ target)
    for step in (0.05, 0.025, 0.0125):
        for edge, sign in 3 * [(edge, sign) for edge in range(4) for sign in (1, -1)]:
            edges = list(box)
            edges[edge] = min(1.0, max(0.0, edges[edge] + sign * step))
            if min(edges[2] - edges[0], edges[3] - edges[1]) < _SMALLEST_CROP:
                continue
            similarity = float(_differences(cropped, edges, _FINE) @ target)
            if similarity > best:
                best, box = similarity, edges
    return min(best, 1.0)
