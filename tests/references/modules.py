"""Networks of torch libraries: random weights, and the outputs of some of their modules."""

from collections.abc import Iterable

import numpy as np
import torch
from networks import from_torch, randomize_norms, to_torch
from torch import nn

# What modules with a shortcut say of themselves in timm, torchvision and transformers.
_HAS_SHORTCUT = ("has_skip", "use_res_connect", "apply_dropout")


@torch.no_grad()
def randomize(network: nn.Module) -> None:
    """Keep activations of order 1: residual branches are weak, so that deep networks are stable."""
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.2, generator=generator)
        if any(getattr(module, name, False) for name in _HAS_SHORTCUT):
            *_, last = (norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d))
            last.weight.uniform_(0.1, 0.3, generator=generator)
    network.eval()


@torch.no_grad()
def outputs(
    network: nn.Module, modules: dict[str, str], pixels: np.ndarray, vectors: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return the outputs of some modules.

    Args:
        network: a network in evaluation mode.
        modules: names of the modules by the stages of ours whose outputs they compute.
        pixels: normalized images ``[b, h, w, 3]``.
        vectors: stages whose outputs are vectors, kept as maps of one pixel or not.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(stage: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            found[stage] = output

        hooks.append(network.get_submodule(modules[stage]).register_forward_hook(hook))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for stage in modules:
        keep(stage)
    network(to_torch(pixels))
    for hook in hooks:
        hook.remove()
    vectors = set(vectors)
    return {
        stage: from_torch(found[stage].flatten(1) if stage in vectors else found[stage])
        for stage in modules
    }
