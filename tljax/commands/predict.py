"""Names what is on photographs, with a pretrained network or one that ``tljax train`` made."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from tljax.commands import cli
from tljax.runtime.ranges import Count


@dataclass(frozen=True)
class Config(cli.Common):
    """Name what is on photographs."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, folders or URLs."""
    top: Count = 5
    """How many names to give for each image."""


def run(config: Config) -> dict[str, Any]:
    """Prints the most probable names of every image."""
    import jax
    import numpy as np

    from tljax.data.loader import refuse_none
    from tljax.data.sources import open_images
    from tljax.features.extract import compute_features
    from tljax.runtime.errors import RequestError

    if not config.images:
        raise RequestError("name at least one file, folder or URL")
    source = open_images(config.images)
    model, variables, card = config.load().with_classes()
    logits = compute_features(
        model, variables, source, config.loading, stop=None, description="predict"
    )
    refuse_none(source, logits.skipped)
    probabilities = np.asarray(jax.nn.softmax(logits.values))
    found = []
    for index, row in zip(logits.indices, probabilities, strict=True):
        top = [
            {"name": card.classes[i], "index": int(i), "probability": float(row[i])}
            for i in np.argsort(-row, kind="stable")[: config.top]
        ]
        found.append({"path": source.names[index], "top": top})
        print(source.names[index])
        for guess in top:
            print(f"  {guess['probability']:.3f}  {guess['name']}")
    for index, reason in logits.skipped.items():
        print(f"{source.names[index]}\n  not read: {reason}")
    return {"images": found, "skipped": {source.names[i]: r for i, r in logits.skipped.items()}}


def main() -> None:
    """Run ``tljax predict``."""
    cli.main(Config, run)
