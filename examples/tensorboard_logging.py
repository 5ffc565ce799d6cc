"""TensorBoard: log the metrics of every step and every epoch.

tensorboardX writes the files; it needs neither torch nor TensorFlow.

    python examples/tensorboard_logging.py FOLDER
    tljax train --data FOLDER --log-every 10 --extension examples/tensorboard_logging.py
    tensorboard --logdir tensorboard_logs
"""

import sys
from functools import cache
from typing import Any

import tljax


def log_to_tensorboard(folder: str) -> dict[str, Any]:
    """Return the callbacks for `tljax.fit`; the first call opens the log in ``folder``."""

    @cache
    def writer() -> Any:
        try:
            from tensorboardX import SummaryWriter  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise SystemExit("this example needs tensorboardX: pip install tensorboardX") from error
        return SummaryWriter(folder)

    def on_step(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer().add_scalar(f"step/{name}", value, step)

    def on_epoch(history: list[dict[str, Any]]) -> None:
        entry = history[-1]
        for name, value in entry.items():
            if isinstance(value, float):
                writer().add_scalar(f"epoch/{name}", value, entry["epoch"])
        writer().flush()

    return {"on_step": on_step, "on_epoch": on_epoch}


extension = log_to_tensorboard("tensorboard_logs")


def main(
    data: str, image_size: int = 96, epochs: int = 4, folder: str = "tensorboard_logs"
) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig(epochs=epochs)
    return tljax.fit(
        model, variables, tljax.open_splits(data), config, **log_to_tensorboard(folder)
    )


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
