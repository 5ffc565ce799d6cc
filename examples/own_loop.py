"""A training loop of your own: what `tljax.fit` does for plain fine-tuning, step by step.

Run it with

    python examples/own_loop.py FOLDER
"""

import sys
from dataclasses import replace

import jax
import optax

import tljax


def main(
    data: str, image_size: int = 96, epochs: int = 4, freeze_to: str = "stage5", seed: int = 0
) -> tuple[tljax.Pretrained, list[float]]:
    """Train the stages after ``freeze_to``; return the network and the loss of every step."""
    splits, loading = tljax.open_splits(data), tljax.Loading()
    model, variables, card = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    model, variables = tljax.replace_head(model, variables, len(splits.train.classes))

    # Only the trainable part has gradients and optimizer state.
    optimizer = optax.adam(1e-3)
    rates = tljax.label(variables["params"], tljax.freeze_table(model, freeze_to=freeze_to))
    trainable, frozen = jax.device_put(tljax.split(variables, rates, ()))
    state = tljax.init_state(trainable["params"], trainable["batch_stats"], optimizer)
    step = tljax.make_train_step(model, optimizer)

    losses = []
    keys = jax.random.key(seed), jax.random.key(seed + 1)  # for augmentation and for dropout
    for epoch in range(1, epochs + 1):
        batches = tljax.load_batches(
            splits.train, model.preprocess, batch_size=32, seed=seed, epoch=epoch
        )
        for batch in batches:
            state, metrics = step(state, frozen, batch, keys)
            total, count = metrics["loss"]
            losses.append(total / count)  # stays on the device: reading it would wait for the step

        variables = tljax.join(state.changing, frozen)
        logits = tljax.compute_features(model, variables, splits.val, loading, stop=None)
        right = (logits.values.argmax(1) == logits.labels).mean()
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, validation accuracy {right:.3f}")
    card = replace(card, classes=splits.train.classes)
    return tljax.Pretrained(model, jax.device_get(variables), card), [float(x) for x in losses]


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
