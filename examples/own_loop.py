"""A loop of one's own: everything that `tljax.fit` does for a plain fine-tuning, in sight.

Try it with

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
    """Train the stages after ``freeze_to``; return the network, and the loss of every step."""
    splits, loading = tljax.open_splits(data), tljax.Loading()
    model, variables, card = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    model, variables = tljax.replace_head(model, variables, len(splits.train.classes))

    # What trains, and what stays: only the former has gradients and a place in the optimizer.
    optimizer = optax.adam(1e-3)
    rates = tljax.label(variables["params"], tljax.freeze_table(model, freeze_to=freeze_to))
    changing, staying = jax.device_put(tljax.split(variables, rates, ()))
    state = tljax.init_state(changing["params"], changing["batch_stats"], optimizer)
    step = tljax.make_train_step(model, optimizer)

    losses = []
    keys = jax.random.key(seed), jax.random.key(seed + 1)  # of augmentation, and of noise
    for epoch in range(1, epochs + 1):
        batches = tljax.load_batches(
            splits.train, model.preprocess, batch_size=32, seed=seed, epoch=epoch
        )
        for batch in batches:
            state, metrics = step(state, staying, batch, keys)
            total, count = metrics["loss"]
            losses.append(total / count)  # on the device: to read it would be to wait for it

        variables = tljax.join(state.changing, staying)
        logits = tljax.compute_features(model, variables, splits.val, loading, stop=None)
        right = (logits.values.argmax(1) == logits.labels).mean()
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, validation accuracy {right:.3f}")
    card = replace(card, classes=splits.train.classes)
    return tljax.Pretrained(model, jax.device_get(variables), card), [float(x) for x in losses]


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
