"""Compare the speed of PGD and APGD with foolbox and torchattacks; print JSON.

All attack the same network and images with the same number of steps, epsilon and step size. PGD
starts at the image. The gradients of torch's parameters are switched off, so that torch does not
compute them.

    python benchmarks/attacks.py --weights efficientnet_lite0.in1k
"""

import tljax

tljax.configure()

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foolbox
import jax
import numpy as np
import torch
import torchattacks
import tyro
from foolbox.models.pytorch import PyTorchModel
from peers import TorchNetwork, device, environment, finish, take_turns, torch_pixels

from tljax.attack import apgd, pgd
from tljax.pretrained import load_pretrained
from tljax.studies.robustness import logits_fn


@dataclass(frozen=True)
class Config:
    """Speed of PGD and APGD, and its ratio to other libraries."""

    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights, as in tljax train."""
    image_size: int | None = None
    """Side of the square images, in pixels; by default what the weights expect."""
    batch_size: int = 8
    """Images per batch."""
    steps: int = 40
    """Number of gradient steps per attack."""
    epsilon: float = 4 / 255
    """Radius of the Linf ball, for pixels in [0, 1]."""
    rounds: int = 3
    """Number of timed rounds."""


def main() -> None:
    config = tyro.cli(Config)
    pretrained = load_pretrained(config.weights).with_size(config.image_size)
    size = pretrained.model.preprocess.size
    rng = np.random.default_rng(0)
    images = rng.random((config.batch_size, size, size, 3), np.float32)
    network = TorchNetwork(pretrained)
    pixels = torch_pixels(images)
    forward = logits_fn(pretrained)
    # The predictions as labels, so that every attack starts at a correct image.
    labels = np.asarray(jax.jit(forward)(images)).argmax(1)
    target = torch.tensor(labels).to(device())
    agree = float(np.mean(network(pixels).argmax(1).cpu().numpy() == labels))

    epsilon, steps, key = config.epsilon, config.steps, jax.random.key(0)
    step_size = 2.5 * epsilon / steps
    foolbox_model = PyTorchModel(network, bounds=(0, 1), device=device())
    fool = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=False)
    torch_pgd = torchattacks.PGD(network, epsilon, step_size, steps, random_start=False)
    torch_apgd = torchattacks.APGD(network, "Linf", epsilon, steps)
    adversarial: dict[str, np.ndarray] = {}

    def in_jax(name: str, **options: Any) -> Callable[[], None]:
        attack = {"pgd": pgd, "apgd": apgd}[name]

        def run() -> None:
            adversarial[name] = np.asarray(
                attack(forward, images, labels, key, epsilon=epsilon, num_steps=steps, **options)
            )

        return run

    def in_torch(name: str, attack: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            adversarial[name] = attack().detach().permute(0, 2, 3, 1).cpu().numpy()
            finish()

        return run

    seconds = take_turns(
        {
            "tljax pgd": in_jax("pgd", step_size=step_size, random_start=False),
            "foolbox pgd": in_torch(
                "foolbox", lambda: fool(foolbox_model, pixels, target, epsilons=epsilon)[1]
            ),
            "torchattacks pgd": in_torch("torchattacks", lambda: torch_pgd(pixels, target)),
            "tljax apgd": in_jax("apgd"),
            "torchattacks apgd": in_torch("", lambda: torch_apgd(pixels, target)),
        },
        config.rounds,
    )
    for name, row in seconds.items():
        row["images_per_second"] = round(config.batch_size / row["seconds"], 3)
        ours = seconds["tljax " + name.rpartition(" ")[2]]
        row["tljax_is_times_as_fast"] = round(row["seconds"] / ours["seconds"], 2)
    report = {
        "environment": {**environment(), "foolbox": foolbox.__version__},
        "weights": Path(config.weights).name,
        "image_size": size,
        "batch_size": config.batch_size,
        "steps": steps,
        "clean_predictions_that_agree": agree,
        "mean_difference_of_pgd_images_in_epsilons": {
            name: float(np.abs(adversarial["pgd"] - adversarial[name]).mean()) / epsilon
            for name in ("foolbox", "torchattacks")
        },
        "attacks": seconds,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
