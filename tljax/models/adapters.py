"""Adapters: few trainable parameters that change a whole network.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds a product of two thin matrices to a kernel. They stand
beside it in the tree of parameters, as ``lora_a`` ``[..., inputs, rank]`` and ``lora_b``
``[rank, outputs]``. `merge_lora` computes the kernels of the network from them, so layers do not
know that they are adapted. BitFit and norm-only training need paths of parameters alone.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Variables

A, B = "lora_a", "lora_b"


def lora_kernels(
    params: Variables, stages: Sequence[str], *, rank: int, targets: Sequence[str] = ()
) -> tuple[str, ...]:
    """Choose the kernels that LoRA adapts, and return their paths.

    Args:
        params: parameters of a network; shapes are enough.
        stages: names of the stages that may be adapted.
        rank: rank of the update.
        targets: patterns of paths. By default all kernels that have at least twice as many
            parameters as their two factors: those of attention, MLPs, 1 x 1 convolutions and wide
            larger ones, but not those of depthwise convolutions and narrow layers.

    Raises:
        RequestError: a pattern matches no kernel, or no kernel is large enough.
    """
    kernels = {
        path: leaf.shape
        for path, leaf in flatten(params).items()
        if path.split("/")[0] in stages and path.endswith("/kernel")
    }
    for pattern in targets:
        if not any(fnmatchcase(path, pattern) for path in kernels):
            known = f", such as {next(iter(kernels))}" if kernels else ""
            raise RequestError(
                f"--adapter-targets {pattern} matches no kernel of {', '.join(stages)}{known}"
            )
    chosen = tuple(
        path
        for path, shape in kernels.items()
        if any(fnmatchcase(path, pattern) for pattern in targets)
        or (not targets and 2 * sum(map(math.prod, factor_shapes(shape, rank))) <= math.prod(shape))
    )
    if not chosen:
        raise RequestError(
            f"--adapter lora: no kernel of {', '.join(stages)} is large enough for --rank {rank}: "
            "lower it, freeze fewer stages, or choose kernels by --adapter-targets"
        )
    return chosen


def factor_shapes(kernel: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the shapes of the factors A and B of the update of a kernel of a given shape."""
    *window, outputs = kernel
    return (*window, rank), (rank, outputs)


def add_lora(params: Variables, kernels: Iterable[str], rank: int, key: PRNGKeyArray) -> Variables:
    """Add the factors of LoRA beside kernels; they do not change the network yet.

    ``lora_a`` is drawn from U(-c, c) with c = 1 / sqrt(inputs), as in the authors' code and in
    peft; ``lora_b`` is zero. The draws for a kernel depend on the key and its path alone.

    Args:
        params: parameters of a network; not modified.
        kernels: paths of kernels ``[..., inputs, outputs]``. A factor A of a convolution has its
            window: [h, w, inputs, rank]. The update of a grouped kernel, too, has rank ``rank``,
            although no two convolutions compute it.
        rank: rank of the update.
        key: random key.

    Returns:
        Parameters with two more leaves for each kernel.
    """
    flat = flatten(params)
    for path in kernels:
        module = path.removesuffix("/kernel")
        a, b = factor_shapes(flat[path].shape, rank)
        bound = 1 / math.sqrt(math.prod(a[:-1]))
        own = jax.random.fold_in(key, crc32(path.encode()))
        flat[f"{module}/{A}"] = jax.random.uniform(own, a, minval=-bound, maxval=bound)
        flat[f"{module}/{B}"] = jnp.zeros(b)
    return unflatten(flat)


def merge_lora(trainable: Variables, frozen: Variables, *, scale: float) -> Variables:
    """Return the parameters of the network: each adapted kernel is kernel + scale * A @ B.

    With ``scale`` bound it is the ``materialize`` of `tljax.make_train_step`. For the multiply-adds
    of a step this is cheap, except that the gradient of a kernel is computed on the way to those of
    its factors.

    Args:
        trainable: trainable parameters, with or without factors.
        frozen: all other parameters of the network.
        scale: alpha / rank.
    """
    flat = flatten(frozen) | flatten(trainable)
    for module in [path.removesuffix(f"/{A}") for path in flat if path.endswith(f"/{A}")]:
        a, b = flat.pop(f"{module}/{A}"), flat.pop(f"{module}/{B}")
        update = jnp.matmul(a, b, precision="highest")  # GPUs and TPUs would round A and B
        flat[f"{module}/kernel"] = flat[f"{module}/kernel"] + scale * update
    return unflatten(flat)


def drop_lora_inputs(trainable: Variables, key: PRNGKeyArray, *, rate: float) -> Variables:
    """Drop input channels of LoRA at random, and scale up the others by 1 / (1 - rate).

    In the paper every input of the branch is dropped on its own. With merged kernels that is
    impossible: here a channel is dropped for all images and positions of a batch together.

    Args:
        trainable: trainable parameters, in which rows of every ``lora_a`` become zero.
        key: random key.
        rate: share of the channels that are dropped, in [0, 1).
    """

    def dropped(path: str, a: jax.Array) -> Any:
        own = jax.random.fold_in(key, crc32(path.encode()))
        keep = jax.random.bernoulli(own, 1 - rate, (a.shape[-2], 1))
        return jnp.where(keep, a / (1 - rate), 0)

    return unflatten(
        {
            path: dropped(path, leaf) if path.endswith(f"/{A}") else leaf
            for path, leaf in flatten(trainable).items()
        }
    )


def lora_paths(params: Variables) -> tuple[str, ...]:
    """Return the paths of the factors that `add_lora` has added."""
    return tuple(path for path in flatten(params) if path.endswith((f"/{A}", f"/{B}")))


def bias_paths(params: Variables) -> tuple[str, ...]:
    """Return the paths of all biases, as BitFit trains them.

    Ben Zaken et al. 2021, arXiv 2106.10199.
    """
    return tuple(path for path in flatten(params) if path.endswith("bias"))


def norm_paths(variables: Variables) -> tuple[str, ...]:
    """Return the paths of the scales and biases of all norms, also of those inside convolutions.

    A norm is a module with scale and bias, or with running statistics. The factor of a layer scale
    is not a norm.
    """
    params = flatten(variables["params"])
    names: dict[str, set[str]] = {}
    for path in params:
        module, _, name = path.rpartition("/")
        names.setdefault(module, set()).add(name)
    running = {path.rpartition("/")[0] for path in flatten(variables["batch_stats"])}
    norms: Collection[str] = running | {m for m, own in names.items() if {"scale", "bias"} <= own}
    return tuple(
        path
        for path in params
        if path.rpartition("/")[0] in norms and path.endswith(("/scale", "/bias"))
    )
