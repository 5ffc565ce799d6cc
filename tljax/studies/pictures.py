"""Visualizations of networks as rows of captioned pictures, for `image_grid`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from tljax import explain
from tljax.data.folders import open_images
from tljax.data.loader import load_batches, require_readable_image
from tljax.models import Model, apply, feature_map, grad_cam_stage
from tljax.models.maps import require_spatial, spatial_stages
from tljax.pretrained import Card, Pretrained
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array, Variables


class Picture(NamedTuple):
    """One picture of a grid.

    Attributes:
        name: file name without extension, unique in the grid.
        caption: caption, with lines separated by newlines.
        pixels: ``[height, width, 3]`` uint8 RGB.
    """

    name: str
    caption: str
    pixels: UInt8[np.ndarray, "height width 3"]


Rows = list[list[Picture]]
Photographs = Sequence[tuple[str, np.ndarray]]
"""(name, pixels ``[size, size, channels]``) of each image, as they are fed to the network."""


def read_photographs(
    network: Pretrained, items: Sequence[str]
) -> tuple[Photographs, dict[str, str]]:
    """Read images at the input size of a network.

    Args:
        network: network whose preprocessing applies.
        items: files, folders or URLs.

    Returns:
        The images, and {name: reason} of the unreadable ones.

    Raises:
        RequestError: a file does not exist, or none can be read.
    """
    if not items:
        raise RequestError("name at least one file, folder or URL")
    source = open_images(items)
    skipped: dict[int, str] = {}
    batches = load_batches(source, network.model.preprocess, batch_size=1, skipped=skipped)
    photographs = [
        (name.rpartition("/")[2], np.asarray(batch.inputs[0]))
        for name, batch in zip(source.names, batches, strict=True)
        if batch.mask[0]
    ]
    require_readable_image(source, skipped)
    return photographs, {source.names[index]: reason for index, reason in skipped.items()}


def ideal_pictures(
    network: Pretrained,
    classes: Sequence[str] = (),
    *,
    num_steps: int = 128,
    tv_weight: float = 1e-3,
    seed: int = 0,
) -> Rows:
    """Synthesize images of classes or labels, or with high numbers, by activation maximization.

    Each is optimized in pixel space and in Fourier space, without and with a penalty on the total
    variation.

    Args:
        network: any network; pictures have its input size.
        classes: names or indices of classes, labels or numbers, one row each. By default Siamese
            cat and zebra if the network has either, otherwise its first two.
        num_steps: number of gradient steps.
        tv_weight: weight of the total variation penalty.
        seed: seed of the initial images and of the random transformations.

    Returns:
        One row of four pictures per class. Captions give the probability of the class, or the
        number, for the 8-bit picture, and its total variation.

    Raises:
        RequestError: a class is unknown.
    """
    model, variables, card = network.require_classes()
    _require_rgb(model)
    chosen = [card.index_of(name) for name in classes] or _default_classes(card)
    labels = np.repeat(chosen, 2)
    weights = jnp.tile(jnp.array([0, tv_weight]), len(chosen))
    # Pictures with and without the penalty start from the same image.
    keys = jnp.repeat(jax.random.split(jax.random.key(seed), len(chosen)), 2)
    columns: list[list[Picture]] = []
    for kind, parametrization in (("pixels", explain.PIXELS), ("fourier", explain.FOURIER)):
        synthesize = partial(
            explain.visualize,
            size=model.preprocess.size,
            parametrization=parametrization,
            tv_weight=weights,
            num_steps=num_steps,
        )
        images = jax.jit(
            lambda v, k: synthesize(explain.class_score(partial(_scores, network, v), labels), k)  # noqa: B023
        )(variables, keys)
        pixels = explain.to_pixels(images)
        decoded = card.task.decode(np.asarray(apply(model, variables, pixels).logits))
        variation = np.asarray(explain.total_variation(pixels / np.float32(255)))
        for part, weighted in enumerate(("", "-tv")):
            columns.append(
                [
                    Picture(
                        f"{label}-{kind}{weighted}",
                        f"{card.classes[label]}\n{kind}{', total variation' if weighted else ''}\n"
                        f"{_format(card, decoded[i], label)}  TV {variation[i]:.0f}",
                        pixels[i],
                    )
                    for i, label in list(enumerate(labels))[part::2]
                ]
            )
    return [list(row) for row in zip(*columns, strict=True)]


def explanation_pictures(
    network: Pretrained, photographs: Photographs, *, target: str | None = None, seed: int = 0
) -> Rows:
    """Attribute the score of a class or label, or a number, to image regions, by five methods.

    Args:
        network: any network.
        photographs: images of `read_photographs`, one row each.
        target: name or index of the class, label or number; by default the most probable class or
            label of each image, or the first number.
        seed: seed of SmoothGrad's noise.

    Returns:
        Per image a row of the image itself and five overlays.

    Raises:
        RequestError: the class is unknown.
    """
    model, variables, card = network.require_classes()
    stage = grad_cam_stage(model)
    after = model.position(stage) + 1
    window = max(1, model.preprocess.size // 7)

    @jax.jit
    def attribution_maps(
        variables: Variables, image: jax.Array, label: jax.Array
    ) -> dict[str, jax.Array]:
        logits_fn = partial(_scores, network, variables)
        return {
            "saliency": explain.saliency(logits_fn, image, label),
            "SmoothGrad": explain.smooth_grad(logits_fn, image, label, jax.random.key(seed)),
            "integrated gradients": explain.integrated_gradients(logits_fn, image, label).sum(-1),
            "Grad-CAM": explain.grad_cam(
                lambda x: apply(model, variables, x, stop=after).value,
                lambda x: _scores(network, variables, x, start=after),
                image,
                label,
                as_map=lambda x: feature_map(model, stage, x, image.shape),
            ),
            "occlusion": explain.occlusion(
                logits_fn, image, label, window=window, stride=max(1, window // 2)
            ),
        }

    target_index = None if target is None else card.index_of(target)
    rows: Rows = []
    for number, (name, pixels) in enumerate(photographs):
        image = as_values(pixels[None])
        decoded = card.task.decode(np.asarray(apply(model, variables, image).logits))[0]
        default = 0 if card.task.kind == "regression" else int(decoded.argmax())
        label = default if target_index is None else target_index
        caption = f"{name}\n{card.classes[label]}\n{_format(card, decoded, label)}"
        shown = explain.as_rgb(pixels)
        row = [Picture(f"{number}-photograph", caption, shown)]
        maps = attribution_maps(variables, image, jnp.array([label]))
        for method in _METHODS:
            picture = explain.overlay(shown[None], maps[method])[0]
            row.append(Picture(f"{number}-{method.replace(' ', '-').lower()}", method, picture))
        rows.append(row)
    return rows


_METHODS = ("saliency", "SmoothGrad", "integrated gradients", "Grad-CAM", "occlusion")


def feature_pictures(network: Pretrained, photographs: Photographs, *, count: int = 8) -> Rows:
    """Draw the channels with the strongest activations, one row per image and stage.

    Args:
        network: any network.
        photographs: images of `read_photographs`.
        count: number of channels per stage, at most the width of the narrowest stage.

    Raises:
        RequestError: ``count`` is below 1.
    """
    model, variables, _ = network
    if count < 1:
        raise RequestError(f"cannot show {count} channels per stage: choose 1 or more")
    stages = spatial_stages(model)
    rows: Rows = []
    for number, (_, pixels) in enumerate(photographs):
        images = pixels[None]
        captured = apply(model, variables, images, capture=stages).captured
        count = min(
            count, *(captured[stage].shape[-1] for stage in stages)
        )  # all rows have the same length
        for stage in stages:
            features = np.asarray(feature_map(model, stage, captured[stage], images.shape)[0])
            strongest = explain.strongest_channels(features, count)
            pictures = explain.channel_pictures(features[..., strongest])
            rows.append(
                [
                    Picture(f"{number}-{stage}-{channel}", f"{stage} {channel}", picture)
                    for channel, picture in zip(strongest, pictures, strict=True)
                ]
            )
    return rows


def dream_pictures(
    network: Pretrained, photographs: Photographs, *, stage: str | None = None, num_steps: int = 20
) -> Rows:
    """Apply DeepDream to images.

    Args:
        network: any network.
        photographs: images of `read_photographs`, one row each.
        stage: stage whose activations are amplified; by default one at two thirds of the stages.
        num_steps: number of gradient steps at each image size.

    Returns:
        Per image a row of the image itself and the result.

    Raises:
        RequestError: the stage is unknown, or its output is not a feature map.
    """
    model, variables, _ = network
    if model.preprocess.dtype != "uint8":
        raise RequestError("a dream needs a network for images of 8 bits, whose range is known")
    features_fn, stage = _features_of(network, stage)
    patch = model.stages[model.position(stage)].patch_size or 1

    @jax.jit
    def dream(variables: Variables, image: jax.Array) -> jax.Array:
        objective = explain.mean_square(partial(features_fn, variables))
        return explain.deep_dream(objective, image, num_steps=num_steps, multiple=patch)

    rows: Rows = []
    for number, (name, pixels) in enumerate(photographs):
        picture = explain.to_pixels(dream(variables, as_values(pixels[None])))[0]
        rows.append(
            [
                Picture(f"{number}-photograph", name, explain.as_rgb(pixels)),
                Picture(f"{number}-{stage}", f"{model.name}\n{stage}", explain.as_rgb(picture)),
            ]
        )
    return rows


def channel_pictures(
    network: Pretrained,
    channels: Sequence[int],
    *,
    stage: str | None = None,
    num_steps: int = 128,
    seed: int = 0,
) -> Rows:
    """Synthesize images that maximize single channels of a stage, in one row.

    Args:
        network: any network; pictures have its input size.
        channels: indices of channels.
        stage: stage whose output has these channels; by default one at two thirds of the stages.
        num_steps: number of gradient steps.
        seed: seed of the initial images and of the random transformations.

    Raises:
        RequestError: the stage is unknown or its output is not a feature map, or no channel is
            given or one is unknown.
    """
    model, variables, _ = network
    _require_rgb(model)
    if not channels:
        raise RequestError("name at least one channel")
    features_fn, stage = _features_of(network, stage)
    size = model.preprocess.size
    width = jax.eval_shape(features_fn, variables, jnp.zeros((1, size, size, 3))).shape[-1]
    if unknown := [channel for channel in channels if not 0 <= channel < width]:
        raise RequestError(f"{stage} has no channel {unknown[0]}: choose from 0 to {width - 1}")

    @jax.jit
    def synthesize(variables: Variables, keys: jax.Array) -> jax.Array:
        means = explain.channel_mean(partial(features_fn, variables))
        objective = explain.class_score(means, np.asarray(channels))
        return explain.visualize(objective, keys, size=size, num_steps=num_steps)

    images = synthesize(variables, jax.random.split(jax.random.key(seed), len(channels)))
    pixels = explain.to_pixels(images)
    return [
        [
            Picture(f"{stage}-{channel}", f"{stage} {channel}", picture)
            for channel, picture in zip(channels, pixels, strict=True)
        ]
    ]


def as_values(images: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Divide images of 8 bits by 255; others stay as they are."""
    return images / np.float32(255) if images.dtype == np.uint8 else images


def _require_rgb(model: Model) -> None:
    if model.preprocess.channels != 3 or model.preprocess.dtype != "uint8":
        raise RequestError(
            f"images are drawn in RGB of 8 bits: {model.name} takes {model.preprocess.channels} "
            f"channels of {model.preprocess.dtype}"
        )


def _features_of(
    network: Pretrained, stage: str | None
) -> tuple[Callable[[Variables, jax.Array], jax.Array], str]:
    """Return a function from images to the feature map of a stage, and the name of the stage."""
    model = network.model
    stages = spatial_stages(model)
    if stage is None:
        stage = stages[len(stages) * 2 // 3]
    require_spatial(model, stage)
    after = model.position(stage) + 1

    def features(variables: Variables, images: jax.Array) -> jax.Array:
        output = apply(model, variables, images, stop=after).value
        return feature_map(model, stage, output, images.shape)

    return features, stage


def _default_classes(card: Card) -> list[int]:
    known = [card.classes.index(name) for name in ("Siamese cat", "zebra") if name in card.classes]
    return known or list(range(min(2, len(card.classes))))


def _scores(
    network: Pretrained,
    variables: Variables,
    inputs: Shaped[Array, "batch ..."],
    start: int | str | None = None,
) -> Float[jax.Array, "batch names"]:
    """Return a value that grows with each class, label or number.

    It is its logit or standardized number. Of an ordered class it is the log-probability to be
    above the class before, plus that not to be above the class itself.
    """
    outputs = apply(network.model, variables, inputs, start=start).logits
    if network.card.task.kind != "ordinal":
        return outputs
    reached = jnp.pad(jax.nn.log_sigmoid(outputs), ((0, 0), (1, 0)))
    not_exceeded = jnp.pad(jax.nn.log_sigmoid(-outputs), ((0, 0), (0, 1)))
    return reached + not_exceeded


def _format(card: Card, decoded: Float[np.ndarray, " names"], index: int) -> str:
    """Return the probability of a class or label, or a number with its unit."""
    if card.task.kind != "regression":
        return f"p {decoded[index]:.3f}"
    unit = card.task.units[index] if card.task.units else ""
    return f"{decoded[index]:.4g} {unit}".rstrip()
