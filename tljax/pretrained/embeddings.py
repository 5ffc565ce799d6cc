"""Heads that compare images with embeddings, such as those of sentences about them (zero-shot)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float

from tljax.models import add_similarity_head
from tljax.pretrained.network import Pretrained
from tljax.runtime.errors import RequestError
from tljax.runtime.task import CLASSIFICATION

CLIP_SCALE = 100.0
"""Factor of the cosines if a file does not say it: to what CLIP's learned one is limited."""


class Embeddings(NamedTuple):
    """One vector per class, and how a logit is made of its cosine with a vector of an image.

    Attributes:
        names: names of the classes.
        vectors: vectors of the classes; their lengths do not matter.
        scale: factor of the cosines.
        bias: what is added to every logit; SigLIP has one.
    """

    names: tuple[str, ...]
    vectors: Float[np.ndarray, "names channels"]
    scale: float = CLIP_SCALE
    bias: float = 0.0


def read_embeddings(path: str | Path) -> Embeddings:
    """Read embeddings from an .npz file.

    Its arrays are ``names`` ``[n]``, ``vectors`` ``[n, channels]``, or ``[n, sentences, channels]``
    for several vectors per class, whose directions are averaged, and optionally the numbers
    ``scale``, by default 100, and ``bias``, by default 0.

    Raises:
        RequestError: the file cannot be read, lacks an array, or one has a wrong shape or values.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise RequestError(f"{path} cannot be read as .npz: {reason}") from error
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise RequestError(
            f"{path} cannot be read as .npz: write it by numpy.savez, the names as text"
        ) from error
    if missing := {"names", "vectors"} - arrays.keys():
        raise RequestError(f"{path} lacks the array {min(missing)}: write names and vectors")
    names = tuple(map(str, np.ravel(arrays["names"])))
    vectors, numbers = arrays["vectors"], [arrays.get("scale", CLIP_SCALE), arrays.get("bias", 0.0)]
    if any(np.size(x) != 1 or not _is_finite(x) for x in numbers) or not np.all(numbers[0] > 0):
        raise RequestError(f"{path}: scale must be a number above 0, and bias a number")
    if not _is_finite(vectors) or vectors.ndim not in (2, 3) or not vectors.size:
        raise RequestError(f"{path}: vectors must be finite numbers [names, channels]")
    if len(names) != len(vectors) or len({*names}) != len(names):
        raise RequestError(f"{path}: names must be different, one for each of the vectors")
    directions = vectors.astype(np.float64).reshape(len(names), -1, vectors.shape[-1])
    lengths = np.linalg.norm(directions, axis=-1, keepdims=True)
    means = (directions / np.where(lengths, lengths, 1)).mean(1)
    if zero := [name for name, mean in zip(names, means, strict=True) if not mean.any()]:
        raise RequestError(f"{path}: the vector of {zero[0]} has no direction, it is zero")
    scale, bias = (float(np.ravel(x)[0]) for x in numbers)
    return Embeddings(names, means.astype(np.float32), scale, bias)


def _is_finite(array: Any) -> bool:
    return np.issubdtype(np.asarray(array).dtype, np.number) and bool(np.isfinite(array).all())


def with_embeddings(pretrained: Pretrained, embeddings: Embeddings) -> Pretrained:
    """Return a network that classifies by the embeddings, without any training.

    Args:
        pretrained: tower of images whose outputs are comparable with the embeddings: the network
            with its projection, or a backbone whose features are.
        embeddings: one vector per class.

    Raises:
        RequestError: the network returns vectors of another length.
    """
    model, variables, card = pretrained
    outputs, channels = model.num_outputs, embeddings.vectors.shape[1]
    if outputs != channels:
        raise RequestError(
            f"{card.source} returns {outputs} numbers, but the embeddings have {channels}: they "
            "belong to another network"
        )
    model, variables = add_similarity_head(
        model, variables, embeddings.vectors, scale=embeddings.scale, bias=embeddings.bias
    )
    card = replace(card, classes=embeddings.names, task=CLASSIFICATION)
    return Pretrained(model, variables, card)


def output_indices(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the index among ``classes`` of each of some names.

    Raises:
        RequestError: a name is not among them.
    """
    if missing := [name for name in names if name not in classes]:
        raise RequestError(
            f"the embeddings name {len(classes)} classes, but not {missing[0]}: add its vector"
        )
    return [classes.index(name) for name in names]
