"""The command ``tljax predict``: classify images."""

from dataclasses import dataclass
from typing import Any

from tljax.commands import cli
from tljax.runtime.ranges import Count


@dataclass(frozen=True)
class Config(cli.Common):
    """Print the most probable classes of images.

    Attributes:
        images: Image files, folders of images or URLs.
        top: Number of classes to print for each image.
    """

    images: cli.Images = ()
    top: Count = 5


def run(config: Config) -> dict[str, Any]:
    """Print the most probable classes of every image."""
    import jax
    import numpy as np

    from tljax.data.folders import open_images
    from tljax.data.loader import require_readable_image
    from tljax.features.extract import compute_features
    from tljax.runtime.errors import RequestError

    if not config.images:
        raise RequestError("name at least one file, folder or URL")
    source = open_images(config.images)
    model, variables, card = config.load().require_classes()
    logits = compute_features(
        model, variables, source, config.loading, stop=None, description="predict"
    )
    require_readable_image(source, logits.skipped)
    probabilities = np.asarray(jax.nn.softmax(logits.values))
    images = []
    for index, row in zip(logits.indices, probabilities, strict=True):
        top = [
            {"name": card.classes[i], "index": int(i), "probability": float(row[i])}
            for i in np.argsort(-row, kind="stable")[: config.top]
        ]
        images.append({"path": source.names[index], "top": top})
        print(source.names[index])
        for guess in top:
            print(f"  {guess['probability']:.3f}  {guess['name']}")
    skipped = {source.names[i]: reason for i, reason in logits.skipped.items()}
    for name, reason in skipped.items():
        print(f"{name}\n  not read: {reason}")
    return {"images": images, "skipped": skipped}
