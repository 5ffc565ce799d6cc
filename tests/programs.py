"""Programs of inference and training with abstract arguments, to compile without a device."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from tljax.models import Model, abstract_variables, apply, build_model
from tljax.runtime.compiled import compile_program
from tljax.runtime.machines import describe_devices, parse_machine
from tljax.runtime.parallel import mesh_of
from tljax.runtime.types import Batch
from tljax.studies.programs import divided, replicated
from tljax.train.freeze import label, split
from tljax.train.step import init_state, make_train_step

MODES = ("inference", "input gradient", "full step", "suffix", "cached suffix")


class Program(NamedTuple):
    """Function and the shapes of its arguments.

    Attributes:
        function: function, jitted or not.
        args: trees of `jax.ShapeDtypeStruct`.
        batched: for each argument, whether it is sharded over the devices.
    """

    function: Any
    args: tuple[Any, ...]
    batched: tuple[bool, ...]


def last_stages(model: Model, count: int = 2) -> list[str]:
    """Return the last stages that have parameters."""
    params = abstract_variables(model)["params"]
    return [name for name in model.stage_names if name in params][-count:]


def program(
    name: str, mode: str, batch: int, *, size: int = 0, dtype: str = "float32", stats: bool = False
) -> Program:
    """Build one of `MODES`; ``stats`` enables batch statistics in the trained stages."""
    model = replace(build_model(name, 10), dtype=dtype)
    size = size or model.preprocess.size
    variables = abstract_variables(model)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)
    if mode == "inference":
        return Program(lambda v, x: apply(model, v, x).logits, (variables, images), (False, True))
    if mode == "input gradient":
        pixels = images.update(dtype=np.float32)
        loss = jax.grad(lambda x, v: (apply(model, v, x).logits ** 2).sum())
        return Program(loss, (pixels, variables), (True, False))
    trained = last_stages(model) if "suffix" in mode else list(variables["params"])
    start = trained[0] if mode == "cached suffix" else None
    if start is not None:
        before: Callable[..., Any] = partial(apply, model, stop=start)
        images = jax.eval_shape(lambda v, x: before(v, x).value, variables, images)
    table = (*((f"{stage}/*", 1.0) for stage in trained), ("*", 0.0))
    moves = {stage for stage in trained if stats}
    changing, staying = split(variables, label(variables["params"], table), moves)
    optimizer = optax.sgd(1e-3, momentum=0.9)
    state = jax.eval_shape(lambda p, s: init_state(p, s, optimizer), *changing.values())
    rows = jax.ShapeDtypeStruct((batch,), np.int32)
    data = Batch(images, rows, rows.update(dtype=np.bool_), rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(model, optimizer, start=start, batch_statistics=moves)
    return Program(
        step,
        (state, staying, data, (key, key)),
        (False, False, True, False),
    )


def compiled(name: str, mode: str, machine: str, batch: int, *, stats: bool, **options: Any) -> Any:
    """Compile a program for a machine that is not at hand; return what it needs and does.

    Args:
        name: name of the network, which runs in bfloat16.
        mode: one of `MODES`.
        machine: name of a `tljax.runtime.machines.Machine`.
        batch: images per device.
        stats: whether the trained stages use batch statistics.
        options: options of the compiler.
    """
    mesh = mesh_of(describe_devices(parse_machine(machine)))
    function, args, batched = program(name, mode, batch * mesh.size, dtype="bfloat16", stats=stats)
    place = {True: divided, False: replicated}
    placed = [place[split](tree, mesh) for tree, split in zip(args, batched, strict=True)]
    function = function if hasattr(function, "lower") else jax.jit(function)
    report = compile_program(function.lower(*placed), **options)
    return {
        "memory": report.memory._asdict(),
        "collectives": report.collectives,
        "instructions": report.instructions,
    }
