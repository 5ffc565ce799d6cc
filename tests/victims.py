"""Small networks to attack, in torch and in JAX, and the reference attacks."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import nn

with warnings.catch_warnings():  # foolbox imports a deprecated name of SciPy
    warnings.simplefilter("ignore", DeprecationWarning)
    import foolbox

SIZE, CLASSES = 10, 10


def images(count: int, seed: int = 0) -> np.ndarray:
    """Return images of multiples of 1/255, smooth enough to differ from each other."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (count, 3, 3, 3)).astype(np.float32)
    smooth = np.asarray(jax.image.resize(coarse, (count, SIZE, SIZE, 3), "linear"))
    noisy = smooth * 0.8 + rng.uniform(0, 0.2, smooth.shape)
    return np.asarray(np.round(noisy * 255) / 255, np.float32)


@cache
def torch_victim(seed: int = 0) -> nn.Module:
    """Build two convolutions and a linear layer, with random batch-norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, CLASSES),
    ).eval()
    for module in net:
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name == "running_var":
                value.data.uniform_(0.05, 0.2, generator=generator)
            elif value.ndim > 1:
                scale = (2 / value[0].numel()) ** 0.5
                value.data.normal_(0, scale, generator=generator)
            elif value.ndim == 1:
                low = 0.5 if name == "weight" else -0.2
                value.data.uniform_(low, low + 0.4, generator=generator)
    net.requires_grad_(False)
    head, logits = net[-1], net(to_torch(images(256, seed=1)))
    head.weight /= logits.std(0)[:, None]  # so that every class is predicted for some image
    head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))
    return net


def to_torch(images) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, 1)))


def to_numpy(images: torch.Tensor) -> np.ndarray:
    return np.moveaxis(images.detach().numpy(), 1, -1)


@cache
def victim(seed: int = 0):
    """Return the network in JAX, from images ``[n, 10, 10, 3]`` to logits ``[n, 10]``."""
    weights = {k: jnp.asarray(v.numpy()) for k, v in torch_victim(seed).state_dict().items()}
    head = weights["6.weight"].reshape(CLASSES, 16, 4, 4).transpose(2, 3, 1, 0)

    def conv(x, name, stride):  # a matrix product compiles quickly
        rows, columns = (range(0, x.shape[axis] - 2, stride) for axis in (1, 2))
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        patches = [
            x[:, i : i + rows.stop : stride, j : j + columns.stop : stride]
            for i in range(3)
            for j in range(3)
        ]
        kernel = kernel.reshape(-1, kernel.shape[-1])
        return jnp.concatenate(patches, axis=-1) @ kernel + weights[f"{name}.bias"]

    @jax.jit  # one program, also outside of an attack
    def logits_fn(images):
        x = conv(jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))), "0", 1)
        x = (x - weights["1.running_mean"]) / jnp.sqrt(weights["1.running_var"] + 1e-5)
        x = jax.nn.relu(x * weights["1.weight"] + weights["1.bias"])
        x = jax.nn.relu(conv(x, "3", 2)).reshape(len(x), -1)
        return x @ head.reshape(-1, CLASSES) + weights["6.bias"]

    return logits_fn


@cache
def one_by_one(seed: int = 0):
    """Return `victim`, run image by image, so that rounding does not depend on the batch size."""
    logits_fn = victim(seed)
    return lambda images: lax.map(lambda image: logits_fn(image[None])[0], images)


@cache
def examples(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Return images and the classes that the victim predicts."""
    inputs = images(count)
    return inputs, np.asarray(victim()(inputs).argmax(-1), np.int32)


def torch_examples(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = examples(count)
    return to_torch(images), torch.from_numpy(labels.astype(np.int64))


def foolbox_victim() -> "foolbox.PyTorchModel":
    return foolbox.PyTorchModel(torch_victim(), bounds=(0, 1))


def accuracy(images, labels, logits_fn=None) -> float:
    logits = (logits_fn or victim())(jnp.asarray(images))
    return float(np.mean(np.asarray(logits.argmax(-1)) == labels))


def linear_victim(weights, bias):
    """Return a classifier of two classes with logits 0 and ``f = x . w + b``."""
    return partial(_linear, np.asarray(weights, np.float32), np.float32(bias))


@jax.jit
def _linear(weights, bias, images):
    f = jnp.dot(images.reshape(len(images), -1), weights, precision="highest") + bias
    return jnp.stack([jnp.zeros_like(f), f], axis=1)
