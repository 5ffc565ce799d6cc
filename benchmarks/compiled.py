"""Compile training steps for a TPU without owning one; write the compiler's estimates as JSON.

    pip install "tljax[rehearse]"
    python benchmarks/compiled.py --out benchmarks/results/compiled-v5e.json

Nothing is timed: cycles are estimates of libtpu, good for comparing two versions of a program;
memory and collectives are facts. Each program is compiled in a process of its own, which takes 2 to
10 minutes on two cores, and added to the file. Programs that the file already has from the same
versions are skipped.
"""

from tljax.runtime.machines import configure_compilers

configure_compilers()

import json
import multiprocessing
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax_networks import NETWORKS
from jax.sharding import NamedSharding, PartitionSpec

from tljax.data.augment import epoch_key
from tljax.data.options import AugmentConfig
from tljax.models import (
    abstract_activations,
    abstract_images,
    abstract_variables,
    apply,
    build_model,
    normalize,
)
from tljax.runtime.compiled import compile_program
from tljax.runtime.errors import first_line
from tljax.runtime.files import atomic_write
from tljax.runtime.machines import describe_devices, parse_machine
from tljax.runtime.parallel import mesh_of
from tljax.runtime.types import Batch
from tljax.train.freeze import label, split
from tljax.train.step import init_state, make_train_step

CLASSES = 1000
CANVAS = 256, 342  # of packed photographs, whose short side has 256 pixels


@dataclass(frozen=True)
class Program:
    """One program of a network in bfloat16, with the images of one chip."""

    network: str
    kind: str = "step"  # or inference
    statistics: str = "running"  # or batch, of all trained stages
    start: str | None = None  # first trained stage; by default everything is trained
    cached: bool = False  # whether activations enter that stage
    crop: str | None = None  # augmentation: by "host" of crops, or of whole photographs by "device"
    machine: str = "v5e-1"
    batch: int = 128
    flax: bool = False  # the network in plain Flax


RESNET, MOBILENET = Program("resnet50"), Program("tf_mobilenetv2_100")
SUFFIX = Program("resnet50", start="layer4")
PROGRAMS = {
    "ResNet-50, batch statistics": replace(RESNET, statistics="batch"),
    "MobileNetV2, batch statistics": replace(MOBILENET, statistics="batch"),
    "ResNet-50, suffix, crops of packed photographs": replace(SUFFIX, crop="device"),
    "ResNet-50, running statistics": RESNET,
    "ResNet-50, 8 chips": replace(RESNET, machine="v5e-8"),
    "ResNet-50, batch statistics, 8 chips": replace(RESNET, statistics="batch", machine="v5e-8"),
    "ResNet-50, suffix": SUFFIX,
    "ResNet-50, suffix, crops of the host": replace(SUFFIX, crop="host"),
    "ResNet-50, suffix, cached": replace(SUFFIX, cached=True),
    "ResNet-50, inference": replace(RESNET, kind="inference"),
    "MobileNetV2, running statistics": MOBILENET,
    "ViT-S/16": Program("vit_small_patch16_224"),
    "ConvNeXt-T": Program("convnext_tiny"),
}
"""Programs by title, the most telling first; those of everything on one chip also in plain Flax."""


def in_flax(program: Program) -> bool:
    """Return whether a program has a counterpart in plain Flax: it trains everything."""
    return program.kind == "step" and program.start is None and program.machine == "v5e-1"


def lower_flax(program: Program, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lower a step of SGD with momentum of the network in plain Flax, with bfloat16 activations."""
    options = {} if program.statistics == "running" else {"running": False}
    network = NETWORKS[program.network](CLASSES, **options)
    preprocess = build_model(program.network, CLASSES).preprocess
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def step(variables: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            x = normalize(images, preprocess)
            half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
            logits, changed = network.apply(
                {**variables, "params": half[0]}, half[1], mutable=["batch_stats"]
            )
            logits = logits.astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), changed

        gradient, changed = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **changed, "params": params}, state

    count = program.batch * mesh.size
    images = jax.ShapeDtypeStruct((count, *preprocess.shape), np.uint8)
    pixels = images.update(shape=(1, *preprocess.shape), dtype=np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), pixels)
    state = jax.eval_shape(optimizer.init, variables["params"])
    labels = jax.ShapeDtypeStruct((count,), np.int32)
    args = *placed((variables, state), mesh), *placed((images, labels), mesh, "data")
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args)


def placed(tree: Any, mesh: jax.sharding.Mesh, *axes: str) -> Any:
    """Give shapes a sharding: replicated, or with an axis divided along the first dimension."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)


def lower(program: Program, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lower a program for the devices of a mesh."""
    if program.flax:
        return lower_flax(program, mesh)
    model = replace(build_model(program.network, CLASSES), dtype="bfloat16")
    variables = jax.eval_shape(lambda: abstract_variables(model))
    count = program.batch * mesh.size
    images = abstract_images(model, count)
    if program.kind == "inference":
        forward = jax.jit(lambda v, x: apply(model, v, x).logits)
        return forward.lower(placed(variables, mesh), placed(images, mesh, "data"))
    first = model.position(program.start or model.stage_names[0])
    trained = [name for name in model.stage_names[first:] if name in variables["params"]]
    table = (*((f"{stage}/*", 1.0) for stage in trained), ("*", 0.0))
    statistics = frozenset(trained if program.statistics == "batch" else ())
    changing, frozen = split(variables, label(variables["params"], table), statistics)
    optimizer = optax.sgd(1e-3, momentum=0.9)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), *changing.values())
    boxes = None
    if program.cached:
        images = abstract_activations(model, variables, program.start, count)
    elif program.crop == "device":
        images = images.update(shape=(count, *CANVAS, 3))
        boxes = jax.ShapeDtypeStruct((count, 7), np.float32)
    rows = jax.ShapeDtypeStruct((count,), np.int32)
    described: Any = images, rows, rows.update(dtype=np.bool_), rows
    batch = Batch(*described, boxes=boxes)  # pyright: ignore[reportArgumentType]
    keys = jax.eval_shape(lambda: (epoch_key(0, 0), jax.random.key(0)))
    step: Any = make_train_step(
        model,
        optimizer,
        start=program.start if program.cached else None,
        batch_statistics=statistics,
        augment=AugmentConfig() if program.crop else None,
    )
    return step.lower(
        placed(state, mesh), placed(frozen, mesh), placed(batch, mesh, "data"), placed(keys, mesh)
    )


def measure(program: Program, effort: float, answer: Connection) -> None:
    """Compile a program and send what the compiler says of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # an aborting compiler prints its stack
    try:
        answer.send(estimates(program, effort))
    except Exception as error:  # noqa: BLE001 - the record states any error
        answer.send({"error": first_line(error)})


def estimates(program: Program, effort: float) -> dict[str, Any]:
    """Compile a program, and return what the compiler says of it."""
    machine = parse_machine(program.machine)
    lowered = lower(program, mesh_of(describe_devices(machine)))
    options = {} if effort == 0 else {"exec_time_optimization_effort": effort}
    report = compile_program(lowered, **options)
    seconds = report.cycles and report.cycles / machine.chip.clock
    images = program.batch * machine.chips
    counted = "gather", "copy", "fusion"
    return {
        "cycles": report.cycles,
        "milliseconds": seconds and round(1e3 * seconds, 2),
        "images_per_second": seconds and round(images / seconds),
        "memory": report.memory._asdict(),
        "collectives": {kind: found._asdict() for kind, found in report.collectives.items()},
        "instructions": {name: report.instructions.get(name, 0) for name in counted},
        "compile_seconds": round(report.seconds, 1),
    }


def in_new_process(program: Program, effort: float) -> dict[str, Any]:
    """Compile a program in a process of its own, which the compiler may abort."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(program, effort, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with {process.exitcode}"}


@dataclass(frozen=True)
class Config:
    """Compile the programs whose titles hold a text, by default all."""

    out: Path
    """JSON file to write, or to go on with."""
    only: str = ""
    """Text that the titles of the programs to compile have in common."""
    flax: bool = True
    """Also compile the networks in plain Flax."""
    effort: float = 0.0
    """Effort of the compiler; with -1 it is quick, and its cycles mean nothing."""


def main() -> None:
    config = tyro.cli(Config)
    versions = {name: version(name) for name in ("jax", "libtpu")}
    report: dict[str, Any] = {**versions, "machine": "v5e", "programs": {}}
    if config.out.exists():
        before = json.loads(config.out.read_text("utf-8"))
        if all(before[name] == versions[name] for name in versions):
            report = before
    for title, ours in PROGRAMS.items():
        sides = {"tljax": ours, **({"flax": replace(ours, flax=True)} if in_flax(ours) else {})}
        for side, program in sides.items():
            rows = report["programs"].setdefault(title, {})
            wanted = config.only in title and (config.flax or side == "tljax")
            if not wanted or "cycles" in rows.get(side, {}):
                continue
            rows[side] = in_new_process(program, config.effort)
            print(title, side, json.dumps(rows[side]), flush=True)
            with atomic_write(config.out) as temporary:
                temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
