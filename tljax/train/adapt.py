"""Adapters of a run: the parameters that an adapter adds or selects, and how they are merged."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import PRNGKeyArray

from tljax.models import Model
from tljax.models.adapters import (
    add_lora,
    bias_paths,
    drop_lora_inputs,
    lora_kernels,
    lora_paths,
    merge_lora,
    norm_paths,
)
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Variables
from tljax.train.freeze import parameter_pattern
from tljax.train.options import FitConfig


def add_adapter(
    model: Model, variables: Variables, config: FitConfig, key: PRNGKeyArray
) -> Variables:
    """Add the parameters of the adapter of a run; they do not change the network yet.

    The stages that ``config.freeze_to`` freezes and the head get none, nor does the first stage by
    default: it sees pixels, and without it its output can be cached.

    Args:
        model: the network.
        variables: variables of ``model``; not modified.
        config: configuration with the defaults of its recipe filled in.
        key: random key.

    Raises:
        RequestError: the targets match no kernel, or no kernel is large enough.
    """
    options = config.adaptation
    if options.adapter != "lora":
        return variables
    names = tuple(name.strip() for names in options.adapter_targets for name in names.split(","))
    targets = [parameter_pattern(model, name) for name in names]
    stages = _adapted_stages(model, variables, config)
    if not targets and stages[:1] == list(model.stage_names[:1]):
        stages = stages[1:]
    kernels = lora_kernels(variables["params"], stages, rank=options.rank, targets=targets)
    return {**variables, "params": add_lora(variables["params"], kernels, options.rank, key)}


def adapter_paths(model: Model, variables: Variables, config: FitConfig) -> Sequence[str]:
    """Return the paths of the parameters of an adapter, which train beside the head.

    Args:
        model: the network.
        variables: variables with those of the adapter, see `add_adapter`; shapes are enough.
        config: configuration with the defaults of its recipe filled in.

    Returns:
        Paths after the frozen stages and before the head; none without an adapter.

    Raises:
        RequestError: these stages hold no parameter that the adapter would train.
    """
    adapter = config.adaptation.adapter
    if adapter == "none":
        return ()
    everywhere = {
        "lora": lambda: lora_paths(variables["params"]),
        "bitfit": lambda: bias_paths(variables["params"]),
        "norm": lambda: norm_paths(variables),
    }[adapter]()
    stages = _adapted_stages(model, variables, config)
    paths = [path for path in everywhere if path.split("/")[0] in stages]
    if not paths:
        nouns = {"bitfit": "biases", "norm": "norms"}
        raise RequestError(
            f"--adapter {adapter}: the stages that are not frozen, {', '.join(stages)}, have no "
            f"{nouns.get(adapter, 'factors')}: freeze fewer or choose another adapter"
        )
    return paths


def _adapted_stages(model: Model, variables: Variables, config: FitConfig) -> list[str]:
    """Return the stages with parameters after the frozen ones and before the head."""
    first = model.position(config.freeze_to) + 1 if config.freeze_to else 0
    stages = [name for name in model.stage_names[first:-1] if name in variables["params"]]
    if not stages:
        raise RequestError(
            f"--freeze-to {config.freeze_to} leaves nothing to adapt: choose an earlier stage"
        )
    return stages


def adapter_functions(config: FitConfig) -> dict[str, Any]:
    """Return the arguments ``materialize`` and ``parameter_noise`` of `make_train_step`.

    Returns:
        {} for an adapter that is no parametrization of its own, and without an adapter.
    """
    options = config.adaptation
    if options.adapter != "lora":
        return {}
    functions: dict[str, Any] = {"materialize": partial(merge_lora, scale=options.scale)}
    if options.adapter_dropout:
        functions["parameter_noise"] = partial(drop_lora_inputs, rate=options.adapter_dropout)
    return functions
