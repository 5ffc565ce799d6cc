"""What a network looks at and has in mind, as captioned pictures: rows for `image_grid`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import explain
from tljax.data.loader import load_batches, refuse_none
from tljax.data.sources import open_images
from tljax.models import Model, apply
from tljax.pretrained import Pretrained
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array, Variables


class Picture(NamedTuple):
    """One cell of a grid.

    Attributes:
        name: of its file, without ending; unique in its rows.
        caption: for a person, lines separated by newlines.
        pixels: ``[height, width, 3]`` uint8.
    """

    name: str
    caption: str
    pixels: np.ndarray


Rows = list[list[Picture]]
Photographs = Sequence[tuple[str, np.ndarray]]
"""Names, and pixels of the size that a network expects."""


def read_photographs(
    network: Pretrained, items: Sequence[str]
) -> tuple[Photographs, dict[str, str]]:
    """Read photographs; and what is wrong with those that cannot be read, by their names.

    Args:
        network: for the size that it expects.
        items: files, folders or URLs.

    Raises:
        RequestError: a file is missing, or none can be read.
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
    refuse_none(source, skipped)
    return photographs, {source.names[index]: reason for index, reason in skipped.items()}


def ideal_pictures(
    network: Pretrained,
    classes: Sequence[str],
    *,
    num_steps: int = 128,
    tv_weight: float = 1e-3,
    seed: int = 0,
) -> Rows:
    """What classes look like to a network: as pixels and as waves, without and with a penalty.

    Args:
        network: any; pictures have the size that it expects.
        classes: names or indices, a row for each.
        num_steps: gradient steps.
        tv_weight: of the total variation where there is a penalty.
        seed: of the starts and of the movements.

    Returns:
        For each class four pictures; captions give the class's probability for the 8-bit picture
        and the picture's total variation.

    Raises:
        RequestError: no class, or an unknown one.
    """
    model, variables, card = network.with_classes()
    if not classes:
        raise RequestError("name at least one class")
    labels = np.repeat([card.index_of(name) for name in classes], 2)
    weights = jnp.tile(jnp.array([0, tv_weight]), len(classes))
    # Those that are compared start alike.
    keys = jnp.repeat(jax.random.split(jax.random.key(seed), len(classes)), 2)
    columns: list[list[Picture]] = []
    for kind, parametrization in (("pixels", explain.PIXELS), ("fourier", explain.FOURIER)):
        paint = partial(
            explain.visualize,
            size=model.preprocess.size,
            parametrization=parametrization,
            tv_weight=weights,
            num_steps=num_steps,
        )
        images = jax.jit(lambda v, k: paint(_class_score(model, v, labels), k))(variables, keys)  # noqa: B023
        pixels = explain.to_pixels(images)
        probabilities = np.asarray(jax.nn.softmax(_logits(model, variables, pixels)))
        variation = np.asarray(explain.total_variation(pixels / np.float32(255)))
        for part, weighted in enumerate(("", "-tv")):
            columns.append(
                [
                    Picture(
                        f"{label}-{kind}{weighted}",
                        f"{card.classes[label]}\n{kind}{', total variation' if weighted else ''}\n"
                        f"p {probabilities[i, label]:.3f}  TV {variation[i]:.0f}",
                        pixels[i],
                    )
                    for i, label in list(enumerate(labels))[part::2]
                ]
            )
    return [list(row) for row in zip(*columns, strict=True)]


def explanation_pictures(
    network: Pretrained, photographs: Photographs, *, target: str | None = None, seed: int = 0
) -> Rows:
    """Which parts of photographs speak for a class, by five methods.

    Args:
        network: any.
        photographs: of `read_photographs`, a row for each.
        target: name or index of the class; by default the most probable of each photograph.
        seed: of SmoothGrad's noise.

    Returns:
        For each photograph itself and five overlays.

    Raises:
        RequestError: an unknown class.
    """
    model, variables, card = network.with_classes()
    *_, top = map_stages(model)
    after = model.stage_names[model.position(top) + 1]
    window = max(1, model.preprocess.size // 7)

    @jax.jit
    def maps_of(variables: Variables, image: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        logits_fn = partial(_logits, model, variables)
        return {
            "saliency": explain.saliency(logits_fn, image, label),
            "SmoothGrad": explain.smooth_grad(logits_fn, image, label, jax.random.key(seed)),
            "integrated gradients": explain.integrated_gradients(logits_fn, image, label).sum(-1),
            "Grad-CAM": explain.grad_cam(
                lambda x: apply(model, variables, x, stop=after).value,
                lambda x: apply(model, variables, x, start=after).logits,
                image,
                label,
            ),
            "occlusion": explain.occlusion(
                logits_fn, image, label, window=window, stride=max(1, window // 2)
            ),
        }

    chosen = None if target is None else card.index_of(target)
    rows: Rows = []
    for number, (name, pixels) in enumerate(photographs):
        image = pixels[None] / np.float32(255)
        probabilities = jax.nn.softmax(_logits(model, variables, image))[0]
        label = int(probabilities.argmax()) if chosen is None else chosen
        caption = f"{name}\n{card.classes[label]}, p {probabilities[label]:.3f}"
        row = [Picture(f"{number}-photograph", caption, pixels)]
        maps = maps_of(variables, image, jnp.array([label]))
        for method in _METHODS:
            picture = explain.overlay(image, maps[method])[0]
            row.append(Picture(f"{number}-{method.replace(' ', '-').lower()}", method, picture))
        rows.append(row)
    return rows


_METHODS = ("saliency", "SmoothGrad", "integrated gradients", "Grad-CAM", "occlusion")


def feature_pictures(network: Pretrained, photographs: Photographs, *, count: int = 8) -> Rows:
    """The channels that answer most to photographs, a row for each photograph and stage.

    Args:
        network: any.
        photographs: of `read_photographs`.
        count: channels of each stage; as many as the narrowest stage has, if that is fewer.

    Raises:
        RequestError: no channel is asked for.
    """
    model, variables, _ = network
    if count < 1:
        raise RequestError(
            f"{count} channels of each stage leave nothing to show; ask for 1 or more"
        )
    stages = map_stages(model)
    rows: Rows = []
    for number, (_, pixels) in enumerate(photographs):
        captured = apply(model, variables, pixels[None], capture=stages).captured
        count = min(count, *(captured[stage].shape[-1] for stage in stages))  # rows of one length
        for stage in stages:
            features = np.asarray(captured[stage][0])
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
    """Photographs beside what DeepDream makes of them.

    Args:
        network: any.
        photographs: of `read_photographs`, a row for each.
        stage: whose output is strengthened; by default one in the middle.
        num_steps: at each size.

    Raises:
        RequestError: an unknown stage.
    """
    model, variables, _ = network
    features_fn, stage = _features_of(network, stage)

    @jax.jit
    def dream(variables: Variables, image: jax.Array) -> jax.Array:
        objective = explain.mean_square(partial(features_fn, variables))
        return explain.deep_dream(objective, image, num_steps=num_steps)

    rows: Rows = []
    for number, (name, pixels) in enumerate(photographs):
        picture = explain.to_pixels(dream(variables, pixels[None] / np.float32(255)))[0]
        rows.append(
            [
                Picture(f"{number}-photograph", name, pixels),
                Picture(f"{number}-{stage}", f"{model.name}, {stage}", picture),
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
    """What single channels of a stage answer to, in one row.

    Args:
        network: any; pictures have the size that it expects.
        channels: which ones.
        stage: of which stage's output; by default one in the middle.
        num_steps: gradient steps.
        seed: of the starts and of the movements.

    Raises:
        RequestError: an unknown stage, no channel, or an unknown one.
    """
    model, variables, _ = network
    if not channels:
        raise RequestError("name at least one channel")
    features_fn, stage = _features_of(network, stage)
    size = model.preprocess.size
    known = jax.eval_shape(features_fn, variables, jnp.zeros((1, size, size, 3))).shape[-1]
    if wrong := [channel for channel in channels if not 0 <= channel < known]:
        raise RequestError(f"{stage} has no channel {wrong[0]}; its channels are 0 to {known - 1}")

    @jax.jit
    def paint(variables: Variables, keys: jax.Array) -> jax.Array:
        means = explain.channel_mean(partial(features_fn, variables))
        objective = explain.score_of(means, np.asarray(channels))
        return explain.visualize(objective, keys, size=size, num_steps=num_steps)

    images = paint(variables, jax.random.split(jax.random.key(seed), len(channels)))
    pixels = explain.to_pixels(images)
    return [
        [
            Picture(f"{stage}-{channel}", f"{stage} {channel}", picture)
            for channel, picture in zip(channels, pixels, strict=True)
        ]
    ]


def map_stages(model: Model) -> tuple[str, ...]:
    """Return the stages whose output is a feature map, with height and width, in order.

    Raises:
        RequestError: there is none.
    """
    if not model.map_stages:
        raise RequestError(f"no stage of {model.name} hands on a feature map")
    return model.map_stages


def _features_of(
    network: Pretrained, stage: str | None
) -> tuple[Callable[[Variables, jax.Array], jax.Array], str]:
    """Images to the output of a stage, and which stage that is."""
    model = network.model
    stages = map_stages(model)
    if stage is None:
        stage = stages[len(stages) * 2 // 3]
    model.position(stage)
    if stage not in stages:
        known = ", ".join(stages)
        raise RequestError(f"the output of {stage} is no feature map; those of {known} are")
    after = model.stage_names[model.position(stage) + 1]
    return lambda variables, images: apply(model, variables, images, stop=after).value, stage


def _class_score(model: Model, variables: Variables, labels: Array) -> explain.Objective:
    return explain.score_of(partial(_logits, model, variables), labels)


def _logits(model: Model, variables: Variables, images: Array) -> jax.Array:
    return apply(model, variables, images).logits
