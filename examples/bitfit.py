"""BitFit: train biases, norm scales and the head; every other kernel stays frozen.

Ben Zaken, Ravfogel and Goldberg 2021, "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models", https://arxiv.org/abs/2106.10199. A list of patterns of
parameter paths says what trains; no other code is needed.

    python examples/bitfit.py FOLDER
    tljax train --data FOLDER --train '*/bias' '*/scale' head
"""

import sys

import jax

import tljax

BITFIT = ("*/bias", "*/scale", "head")


def count(model: tljax.Model, variables: tljax.Variables) -> tuple[int, int]:
    """Return the number of trainable parameters and the number of all parameters."""
    rates = tljax.label(variables["params"], tljax.freeze_table(model, train=BITFIT))
    trainable, _ = tljax.split(variables, rates, ())
    trained, total = (
        sum(leaf.size for leaf in jax.tree.leaves(tree["params"]))
        for tree in (trainable, variables)
    )
    return trained, total


def main(data: str, image_size: int = 96, epochs: int = 4) -> tljax.FitResult:
    """Fit a linear probe, then train biases, norm scales and the head from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig(
        train=BITFIT, epochs=epochs, optimizer=tljax.OptimizerConfig(learning_rate=1e-3)
    )
    result = tljax.fit(model, variables, tljax.open_splits(data), config)
    trained, total = count(result.model, result.variables)
    print(f"{result.evaluation.top1:.3f} with {trained} of {total} parameters trained")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
