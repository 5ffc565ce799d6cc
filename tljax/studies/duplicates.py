"""Which validation images were seen in training: the same pixels, or the same photograph.

Photographs that come from the web come twice: saved again as JPEG, resized, cropped, mirrored. An
accuracy that is measured on them flatters (Barz and Denzler, "Do we train on test data? Purging
CIFAR of near-duplicates", 2020, https://arxiv.org/abs/1902.00423).

An image is compared by the horizontal and vertical differences of a grey thumbnail, normalised: a
difference hash that keeps its magnitudes. First, 8 x 8 differences of whole images are compared
with those of a dozen crops, for all pairs at once, by matrix products. Then the crop of each of the
few most similar pairs is fitted until the 16 x 16 differences agree best.

Measured on the 3,268 photographs of hymenoptera, pets37, cats_dogs and an ImageNet sample: among
5.3 million pairs of different ones none is more similar than 0.81. Of 1,634 copies, cropped at
random, half of them mirrored, resized and saved again as JPEG, all are found if the crop keeps at
least 90% of each side, 99% at 80% and 77% at 70%, and none with another image than its own.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from tljax.data.decode import open_image
from tljax.data.sources import Examples
from tljax.runtime.errors import UnreadableImageError
from tljax.runtime.files import sha256

THRESHOLD = 0.9
"""Similarity from which two images are the same photograph; see the module for what it parts."""

SMALLEST = 32
"""Short side, in pixels, below which only identical pixels count: digits all look alike."""

_THUMBNAIL = 64
_COARSE, _FINE = 8, 16  # differences a side
_COARSE_THRESHOLD = 0.75
_CANDIDATES = 8  # pairs that are looked at closely for each validation image
_BLOCK = 1024  # training images that are compared at once
_SMALLEST_CROP = 0.6  # of a side

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the sides."""

# What is compared with the whole of the other image; the last is the central square.
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
    """A validation image that was seen in training.

    Attributes:
        train: position of the training image that is most similar.
        val: position of the validation image.
        kind: ``exact`` for the same pixels; ``near`` for the same photograph; ``mirrored`` for its
            mirror image.
        similarity: cosine of the fitted differences, at most 1; 1 for ``exact``.
    """

    train: int
    val: int
    kind: Literal["exact", "near", "mirrored"]
    similarity: float


def find_duplicates(
    train: Examples, val: Examples, *, threshold: float = THRESHOLD
) -> list[Duplicate]:
    """Finds the validation images that were seen in training.

    Copies are found through JPEG, resizing, changes of brightness, contrast and aspect, greyscale,
    mirroring, and crops that keep about 80% of each side; not through rotation. Frames of one video
    count as copies, for a network learns the same from them. An image that cannot be read is left
    out, as in training; one without any structure, such as a blank page, equals only itself.

    Memory is 4 KiB for each training and 18 KiB for each validation image, whatever their sizes.

    Args:
        train: encoded files or uint8 RGB pixels, such as `tljax.data.sources.Source.examples` or an
            array ``[n, height, width, 3]``.
        val: the same.
        threshold: similarity in (0.75, 1] from which two images count as one photograph.

    Returns:
        One entry for each validation image that was seen, in order, with the training image that it
        is most like: their number is the number of validation images that measure memory.
    """
    ours, theirs = _summarise(train), _summarise(val)
    first: dict[str, int] = {}
    for i, digest in enumerate(ours.digests):
        first.setdefault(digest, i)
    found = {
        j: Duplicate(first[digest], j, "exact", 1.0)
        for j, digest in enumerate(theirs.digests)
        if digest and digest in first
    }
    rest = [j for j in _comparable(theirs) if j not in found]
    for candidate in _candidates(ours, _comparable(ours), theirs, rest):
        similarity = max(_fit_crop(*fit) for fit in candidate.fits)
        j = candidate.val
        if similarity >= threshold and (j not in found or similarity > found[j].similarity):
            kind = "mirrored" if candidate.mirrored else "near"
            found[j] = Duplicate(candidate.train, j, kind, similarity)
    return [found[j] for j in sorted(found)]


class _Summary(NamedTuple):
    """What is kept of each image.

    Attributes:
        digests: SHA-256 of the pixels; "" for an image that cannot be read.
        thumbnails: ``[n, side, side]`` uint8, grey, squeezed to a square.
        sizes: ``[n, 2]`` width and height of the image; 0 if it cannot be read.
    """

    digests: list[str]
    thumbnails: np.ndarray
    sizes: np.ndarray


def _summarise(examples: Examples) -> _Summary:
    thumbnails = np.zeros((len(examples), _THUMBNAIL, _THUMBNAIL), np.uint8)
    sizes = np.zeros((len(examples), 2), np.int32)

    def summarise(index: int) -> str:
        try:
            data = examples[index]
            image = Image.fromarray(data) if isinstance(data, np.ndarray) else open_image(data)
        except UnreadableImageError:
            return ""
        grey = image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
        thumbnails[index], sizes[index] = np.asarray(grey), image.size
        return sha256(repr(image.size).encode() + image.tobytes())

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(summarise, range(len(examples))))
    return _Summary(digests, thumbnails, sizes)


def _comparable(images: _Summary) -> list[int]:
    return np.flatnonzero(images.sizes.min(1, initial=SMALLEST) >= SMALLEST).tolist()


class _Candidate(NamedTuple):
    """Two images that may be one.

    Attributes:
        train: position.
        val: position.
        mirrored: whether the validation image is to be mirrored first.
        fits: either way round, a thumbnail, the crop of it that may be the other image, and the
            other's thumbnail.
    """

    train: int
    val: int
    mirrored: bool
    fits: list[tuple[np.ndarray, Box, np.ndarray]]


def _candidates(
    ours: _Summary, i_of: Sequence[int], theirs: _Summary, j_of: Sequence[int]
) -> Iterator[_Candidate]:
    """For each validation image of ``j_of``, the few of ``i_of`` that are most similar."""
    upright = theirs.thumbnails[j_of]
    sides = (upright, upright[:, :, ::-1])
    val = [_describe(side, theirs.sizes[j_of]) for side in sides]
    best = np.full((_CANDIDATES, len(j_of)), -1, np.float32)
    who = np.zeros(best.shape, np.int32)
    for start in range(0, len(i_of), _BLOCK):
        block = np.asarray(i_of[start : start + _BLOCK])
        train = _describe(ours.thumbnails[block], ours.sizes[block])
        similarity = np.full((len(block), len(j_of)), -1, np.float32)
        product = np.empty_like(similarity)
        for side in val:
            # Either image may be the crop: a view of one with the whole of the other.
            pairs = [(of_train, side[0]) for of_train in train]
            pairs += [(train[0], of_val) for of_val in side[1:]]
            for of_train, of_val in pairs:
                np.matmul(of_train, of_val.T, out=product)
                np.maximum(similarity, product, out=similarity)
        best = np.concatenate([best, similarity])
        who = np.concatenate([who, np.broadcast_to(block[:, None], similarity.shape)])
        top = np.argpartition(-best, _CANDIDATES - 1, axis=0)[:_CANDIDATES]
        best, who = (np.take_along_axis(x, top, axis=0) for x in (best, who))

    for rank, column in np.argwhere(best > _COARSE_THRESHOLD):
        i, j = int(who[rank, column]), int(j_of[column])
        train = _describe(ours.thumbnails[[i]], ours.sizes[[i]])[:, 0]
        train_cropped, val_cropped = (
            np.stack(products)
            for products in zip(
                *((train @ side[0, column], side[:, column] @ train[0]) for side in val),
                strict=True,
            )
        )
        mirrored = int(np.maximum(train_cropped, val_cropped).max(1).argmax())
        one, other = ours.thumbnails[i], sides[mirrored][column]
        box = _box(_VIEWS[train_cropped[mirrored].argmax()], ours.sizes[i])
        back = _box(_VIEWS[val_cropped[mirrored].argmax()], theirs.sizes[j])
        yield _Candidate(i, j, bool(mirrored), [(one, box, other), (other, back, one)])


def _box(view: Box | None, size: np.ndarray) -> Box:
    if view is not None:
        return view
    x, y = (1 - size.min() / size) / 2
    return x, y, 1 - x, 1 - y


def _describe(thumbnails: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The normalised differences of all views of each image, ``[views, n, 2 * side * side]``."""
    described = np.empty((len(_VIEWS), len(sizes), 2 * _COARSE**2), np.float32)
    for v, view in enumerate(_VIEWS):
        for k, size in enumerate(sizes):
            described[v, k] = _differences(thumbnails[k], _box(view, size), _COARSE)
    return described


def _differences(thumbnail: np.ndarray, box: Sequence[float], side: int) -> np.ndarray:
    # In floating point: eight bits would round away the differences of a low-contrast image.
    image = Image.fromarray(thumbnail.astype(np.float32))
    left, top, right, bottom = (_THUMBNAIL * edge for edge in box)
    small = np.asarray(
        image.resize((side + 1, side + 1), Image.Resampling.BILINEAR, (left, top, right, bottom))
    )
    corner = small[1:, 1:]
    differences = np.stack([corner - small[1:, :-1], corner - small[:-1, 1:]]).ravel()
    # Half a grey level on average is no structure but the noise of compression.
    return differences / max(float(np.linalg.norm(differences)), 0.5 * differences.size**0.5)


def _fit_crop(cropped: np.ndarray, start: Box, whole: np.ndarray) -> float:
    """The highest cosine of the fine differences that moving the edges of the crop reaches."""
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
