"""Weights & Biases: log the metrics of every step and every epoch, offline until you sync.

Run one of these, then the last line:

    python examples/wandb_logging.py FOLDER
    tljax train --data FOLDER --log-every 10 --extension examples/wandb_logging.py
    wandb sync --sync-all
"""

import sys
from functools import cache
from typing import Any

import tljax


def log_to_wandb(project: str) -> dict[str, Any]:
    """Return the callbacks for `tljax.fit`; the first call starts the run."""

    @cache
    def run() -> Any:
        try:
            import wandb  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise SystemExit("this example needs wandb: pip install wandb") from error
        return wandb.init(project=project, mode="offline")

    def on_step(step: int, metrics: dict[str, float]) -> None:
        run().log({f"step/{name}": value for name, value in metrics.items()}, step=step)

    def on_epoch(history: list[dict[str, Any]]) -> None:
        run().log({f"epoch/{name}": value for name, value in history[-1].items()})

    return {"on_step": on_step, "on_epoch": on_epoch}


extension = log_to_wandb("tljax")


def main(data: str, image_size: int = 96, epochs: int = 4) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig(epochs=epochs)
    return tljax.fit(model, variables, tljax.open_splits(data), config, **log_to_wandb("tljax"))


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
