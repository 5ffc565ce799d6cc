"""NumPy arrays: train on images and labels that are already in memory.

    python examples/numpy_arrays.py ARRAYS.npz

The file holds ``images``, ``[n, height, width, 3]`` uint8 RGB, and ``labels``, ``[n]`` integers
from 0.
"""

import sys
from collections.abc import Sequence

import numpy as np

import tljax


def open_arrays(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str] = (), val_fraction: float = 0.2
) -> tljax.Splits:
    """Make a data set of arrays.

    Args:
        images: ``[n, height, width, 3]`` uint8 RGB.
        labels: ``[n]`` class indices, from 0.
        classes: name of each class; by default its index.
        val_fraction: share of the examples, drawn at random, that is held out for validation.
    """
    whole = tljax.Source(
        examples=images,
        labels=labels.astype(np.int32),
        classes=tuple(classes) or tuple(str(i) for i in range(labels.max() + 1)),
        names=[f"row {i}" for i in range(len(images))],
    )
    order = np.random.default_rng(0).permutation(len(whole))
    val, train = np.split(order, [round(val_fraction * len(whole))])
    return tljax.Splits(tljax.select(whole, train), tljax.select(whole, val), ())


def main(data: str, image_size: int = 96, epochs: int = 4) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    arrays = np.load(data)
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    splits = open_arrays(arrays["images"], arrays["labels"])
    result = tljax.fit(model, variables, splits, tljax.FitConfig(epochs=epochs))
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    return result


if __name__ == "__main__":
    main(sys.argv[1])
