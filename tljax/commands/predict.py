"""The command ``tljax predict``: classify images, or read numbers from them."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tljax.commands import cli
from tljax.runtime.ranges import Count

if TYPE_CHECKING:
    import numpy as np

    from tljax.pretrained.network import Card


@dataclass(frozen=True)
class Config(cli.Common, cli.Classifier):
    """Print what a network predicts for images.

    It prints the most probable classes, all labels whose probability reaches their threshold, or
    numbers.

    Attributes:
        images: Image files, folders of images or URLs.
        top: Number of classes to print for each image.
        out: CSV file for the predictions, with one row per image: the class and its probability, or
            the labels and all their probabilities, or the numbers. By default none is written.
    """

    images: cli.Images = ()
    top: Count = 5
    out: Path | None = None


def run(config: Config) -> dict[str, Any]:
    """Print, and with ``--out`` write, the predictions for every image."""
    from tljax.data.folders import open_images
    from tljax.data.loader import require_readable_image
    from tljax.features.extract import compute_features
    from tljax.runtime.errors import RequestError
    from tljax.runtime.files import atomic_write
    from tljax.train.run_directory import format_csv

    if not config.images:
        raise RequestError("name at least one file, folder or URL")
    source = open_images(config.images)
    model, variables, card = config.load().require_classes()
    with atomic_write(config.out) if config.out else nullcontext() as table:
        outputs = compute_features(
            model, variables, source, config.loading, stop=None, description="predict"
        )
        require_readable_image(source, outputs.skipped)
        if table:
            names = [source.names[index] for index in outputs.indices]
            table.write_bytes(format_csv(*_table(card, outputs.values, names)))
    decoded = card.task.decode(outputs.values)
    images = []
    for index, row in zip(outputs.indices, decoded, strict=True):
        image = {"path": source.names[index], **_prediction(card, row, config.top)}
        images.append(image)
        print("\n".join([image["path"], *_lines(image)]))
    skipped = {source.names[i]: reason for i, reason in outputs.skipped.items()}
    for name, reason in skipped.items():
        print(f"{name}\n  not read: {reason}")
    if config.out:
        print(f"predictions written to {config.out}")
    return {"task": card.task.kind, "images": images, "skipped": skipped}


def _prediction(card: "Card", row: "np.ndarray", top: int) -> dict[str, Any]:
    """Return the prediction for one image as JSON.

    Args:
        card: the task, and the names of classes, labels or numbers.
        row: ``[names]`` what `Task.decode` returned for the image.
        top: number of classes.
    """
    if card.task.kind == "regression":
        return {
            "numbers": [
                {"name": name, "value": value, "text": card.task.format_number(value, i)}
                for i, (name, value) in enumerate(zip(card.classes, row.tolist(), strict=True))
            ]
        }
    order = (-row).argsort(kind="stable")
    if card.task.kind == "multilabel":
        applies = card.task.applies(row[None])[0]
        return {"labels": [card.guess(row, i) for i in order if applies[i]]}
    return {"top": [card.guess(row, i) for i in order[:top]]}


def _lines(image: dict[str, Any]) -> Iterator[str]:
    for number in image.get("numbers", ()):
        yield f"  {number['name']} {number['text']}"
    for guess in image.get("top", image.get("labels", ())):
        yield f"  {guess['probability']:.3f}  {guess['name']}"
    if image.get("labels") == []:
        yield "  no label"


def _table(
    card: "Card", outputs: "np.ndarray", paths: Sequence[Any]
) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of the CSV file."""
    decoded = card.task.decode(outputs)
    rows = zip(paths, card.task.predict(outputs), decoded, strict=True)
    if card.task.kind == "regression":
        return ["path", *card.classes], [[path, *row.tolist()] for path, _, row in rows]
    if card.task.kind == "multilabel":
        return ["path", "labels", *card.classes], [
            [path, "|".join(compress(card.classes, applies)), *row.tolist()]
            for path, applies, row in rows
        ]
    return ["path", "class", "probability"], [
        [path, card.classes[i], float(row[i])] for path, i, row in rows
    ]
