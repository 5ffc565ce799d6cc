"""Measure tljax on one GPU or TPU, compared with torch, in a limited number of minutes.

It needs JAX, Flax and optax, but no installed package of tljax, grain, tyro, images or network
connection. It compares with torch and torchvision where they are installed:

    python benchmarks/accelerator.py --minutes 8 --out accelerator.json

Every part runs in a process of its own, so that a crash or a hang does not affect the others, and
the JSON file is updated while it runs. The sides of a comparison are timed in turns, and a number
is the median over the turns. ``--parts`` measures the parts that an earlier run skipped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tljax need not be installed

import tljax

tljax.configure("bfloat16")  # before JAX is imported

import argparse
import contextlib
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from tljax.attack import pgd
from tljax.data.augment import augment, epoch_key
from tljax.data.boxes import Crops, pixel_boxes
from tljax.data.options import AugmentConfig
from tljax.features.logistic import fit_logistic
from tljax.models import Model, abstract_variables, apply, build_model
from tljax.models.convolution import backend
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten, tree_digest, unflatten
from tljax.runtime.types import Batch, Variables
from tljax.train.freeze import label, split
from tljax.train.step import init_state, make_train_step

REFERENCES = Path(__file__).with_name("accelerator_references.npz")

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""The largest error of a logit, relative to the largest logit."""

EVERYTHING = (("*", 1.0),)
SUFFIX = (("layer4/*", 1.0), ("head/*", 1.0), ("*", 0.0))

Call = Callable[[], Any]


class Skip(Exception):  # noqa: N818 - not an error
    """A measurement that is impossible on this machine; the message says why."""


class Work(NamedTuple):
    """A function to time: ``call`` starts it, ``wait`` returns when its result is ready."""

    call: Call
    wait: Callable[[Any], Any]


class Bench:
    """The record of one part, with the methods that compile and measure."""

    def __init__(self, part: str, out: Path, *, quick: bool, compare: bool) -> None:
        self.quick, self.compare, self.out = quick, compare, out
        device = jax.devices()[0]
        self.record: dict[str, Any] = {
            "device": device.device_kind,
            "platform": device.platform,
            "programs": {},
            "turns": {},
            "notes": [],
        }
        self.part = part
        self.cached = 0
        jax.monitoring.register_event_listener(self._on_event)
        self.save()

    def _on_event(self, event: str, **_: Any) -> None:
        self.cached += event == "/jax/compilation_cache/cache_hits"

    @property
    def network(self) -> str:
        """Name the network of most parts."""
        return "resnet18" if self.quick else "resnet50"

    def batch(self, count: int) -> int:
        """Return the batch size: ``count``, or 4 with --quick."""
        return 4 if self.quick else count

    @property
    def size(self) -> int:
        """Return the side of the images, in pixels."""
        return 64 if self.quick else 224

    def save(self, **values: Any) -> None:
        """Add values to the record and write it, so that it is complete up to here."""
        self.record |= values
        stats = jax.devices()[0].memory_stats() or {}
        self.record["peak_memory_bytes"] = stats.get("peak_bytes_in_use")
        write(self.out, self.record)

    def note(self, text: str) -> None:
        """Record what is not measured, and why."""
        print(f"  {text}", flush=True)
        self.record["notes"].append(text[:2000])
        self.save()

    def compile(self, name: str, function: Any, *args: Any) -> Callable[..., Any]:
        """Compile a program; record the seconds, the FLOPs and the memory."""
        hits, began = self.cached, time.perf_counter()
        lowered = function.lower(*args)
        traced = time.perf_counter()
        program = lowered.compile()
        facts: dict[str, Any] = {
            "trace_seconds": round(traced - began, 2),
            "compile_seconds": round(time.perf_counter() - traced, 2),
            "from_the_cache": self.cached > hits,
        }
        with contextlib.suppress(Exception):  # not every platform reports it
            facts["flops"] = float(lowered.cost_analysis()["flops"])
        with contextlib.suppress(Exception):  # without the calls of GPU libraries
            facts["optimized_flops"] = float(program.cost_analysis()["flops"])
        with contextlib.suppress(Exception):
            facts["temporary_bytes"] = int(program.memory_analysis().temp_size_in_bytes)
        self.record["programs"][name] = facts
        self.save()
        print(f"  {name}: compiled in {facts['compile_seconds']} s", flush=True)
        return program

    def turns(
        self, title: str, work: dict[str, Work], count: int, flops: float | None = None
    ) -> None:
        """Time functions in turns; a function that fails is left out and its error recorded.

        Args:
            title: the title of the record.
            work: the functions; the others are compared with the first one.
            count: number of examples of a call.
            flops: FLOPs of a call.
        """
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, int] = {}
        for name, (call, wait) in work.items():
            try:
                began = time.perf_counter()
                wait(call())
                rows[name] = {"first_call_seconds": round(time.perf_counter() - began, 3)}
                wait(call())
                began = time.perf_counter()
                wait(call())
                one = time.perf_counter() - began
                calls[name] = 1 if self.quick else int(np.clip(0.5 / one, 1, 30))
            except Exception as error:  # noqa: BLE001 - the others can be measured
                rows[name] = {"error": repr(error)[:2000]}
            self.save(turns={**self.record["turns"], title: rows})
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        dispatch: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(2 if self.quick else 7):
            for name, repeats in calls.items():
                call, wait = work[name]
                began, result = time.perf_counter(), None
                for _ in range(repeats):
                    result = call()
                started = time.perf_counter()
                wait(result)
                seconds[name].append((time.perf_counter() - began) / repeats)
                dispatch[name].append((started - began) / repeats)
        ours = next(iter(work))
        for name, times in seconds.items():
            middle = statistics.median(times)
            host = statistics.median(dispatch[name])
            rows[name] |= {
                "seconds": middle,
                "fastest_seconds": min(times),
                "slowest_seconds": max(times),
                "turns": len(times),
                "calls_of_a_turn": calls[name],
                "examples_per_second": count / middle,
                "host_seconds_of_a_call": host,
                "in_flight_after_a_turn": round(calls[name] * (1 - host / middle), 1),
            }
            if flops:
                rows[name]["teraflops_per_second"] = flops / middle / 1e12
            if name != ours and ours in seconds:
                faster = middle / statistics.median(seconds[ours])
                rows[name]["takes_times_as_long"] = round(faster, 3)
        self.save(turns={**self.record["turns"], title: rows})

    def flops(self, name: str) -> float | None:
        """Return the FLOPs of a program, as XLA counts them before optimization."""
        return self.record["programs"][name].get("flops")


def write(path: Path, value: Any) -> None:
    """Write JSON; the file is replaced once the new one is complete."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1), "utf-8")
    new.replace(path)


# Networks and their inputs.


def variables_of(model: Model, seed: int = 0) -> Variables:
    """Draw weights and batch-norm statistics that are the same on every machine.

    They are uniform because such numbers are made of random bits and exact arithmetic.
    """
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        uniform = rng.random(shape, np.float32)
        match path.rpartition("/")[2]:
            case "kernel":
                bound = np.float32(np.sqrt(6 / np.prod(shape[:-1])))
                return (2 * uniform - 1) * bound
            case "scale" | "var":
                return np.float32(0.5) + uniform
            case _:
                return (uniform - np.float32(0.5)) / 2

    skeleton = flatten(abstract_variables(model))
    drawn = unflatten({path: draw(path, skeleton[path].shape) for path in sorted(skeleton)})
    return {"params": {}, "batch_stats": {}, **drawn}


def images_of(count: int, height: int, width: int) -> np.ndarray:
    """Draw images ``[count, height, width, 3]`` in uint8."""
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)


def labels_of(count: int, classes: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32) % classes


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def forward(model: Model, variables: Variables, images: jax.Array) -> jax.Array:
    return apply(model, variables, images).logits


def training_step(
    bench: Bench,
    name: str,
    model: Model,
    variables: Variables,
    images: Any,
    *,
    table: tuple[tuple[str, float], ...] = EVERYTHING,
    training: frozenset[str] = frozenset(),
    start: str | None = None,
) -> Work:
    """Compile a step of SGD with momentum; every call continues from the last state.

    Args:
        bench: compiles the program.
        name: the name of the program.
        model: the network.
        variables: its variables.
        images: a batch; with ``start`` the activations that enter that stage.
        table: the learning rate of each pattern of parameters; see `label`.
        training: the stages whose batch norms use the statistics of the batch.
        start: the first stage to run.
    """
    optimizer = optax.sgd(1e-6, momentum=0.9)
    trainable, frozen = split(variables, label(variables["params"], table), training)
    # Copies, because a step donates its state.
    trainable = jax.tree.map(jnp.array, trainable)
    state = init_state(trainable["params"], trainable["batch_stats"], optimizer)
    frozen = on_device(frozen)
    count = len(images)
    labels = labels_of(count, model.num_classes)
    rows = np.arange(count, dtype=np.int32)
    batch = on_device(Batch(images, labels, np.ones(count, bool), rows))
    keys = jax.random.key(0), jax.random.key(1)
    step = make_train_step(model, optimizer, start=start, batch_statistics=training)
    program = bench.compile(name, step, state, frozen, batch, keys)

    def call() -> jax.Array:
        nonlocal state
        state, _ = program(state, frozen, batch, keys)
        return state.step

    return Work(call, jax.block_until_ready)


class Torch:
    """The same networks in torch: channels last, bfloat16 by autocast.

    Raises:
        Skip: if torch or torchvision is not installed, or torch has no GPU.
    """

    def __init__(self, bench: Bench) -> None:
        if not bench.compare:
            raise Skip("without torch: --alone")
        if "GPU" not in jax.devices()[0].platform.upper() and not bench.quick:
            raise Skip("without torch: it is compared on a GPU only")
        try:
            self.torch = torch = import_module("torch")
            self.models = import_module("torchvision.models")
        except Exception as error:
            raise Skip(f"without torch: {error!r}") from error
        on_gpu = torch.cuda.is_available()
        if not on_gpu and not bench.quick:
            raise Skip("without torch: it finds no GPU")
        self.bench, self.device = bench, "cuda" if on_gpu else "cpu"
        torch.backends.cudnn.allow_tf32 = True  # the default for convolutions, not for products
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    def wait(self, _: Any = None) -> None:
        """Wait until the GPU is done, and record the peak memory of torch."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()
            peak = self.torch.cuda.max_memory_allocated()
            self.bench.record["torch_peak_memory_bytes"] = peak

    def network(self, name: str, classes: int = 1000) -> Any:
        """Build a network of pixels ``[n, 3, height, width]``, uint8 or in [0, 1]."""
        torch = self.torch
        normal = Preprocess()
        build = getattr(self.models, name, None)
        if build is None:
            build = partial(import_module("timm").create_model, name)
        mean, std = (
            torch.tensor(x, device=self.device)[:, None, None] for x in (normal.mean, normal.std)
        )

        class Normalized(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = build(num_classes=classes)

            def forward(self, pixels: Any) -> Any:
                if not pixels.is_floating_point():
                    pixels = pixels.float() / 255
                return self.network((pixels - mean) / std)

        return Normalized().to(self.device, memory_format=torch.channels_last)

    def pixels(self, images: np.ndarray) -> Any:
        """Convert images ``[n, height, width, 3]`` to the layout and device of torch."""
        tensor = self.torch.from_numpy(images).permute(0, 3, 1, 2)
        return tensor.to(self.device, memory_format=self.torch.channels_last)

    def target(self, labels: np.ndarray) -> Any:
        """Convert labels ``[n]``."""
        return self.torch.from_numpy(labels.astype(np.int64)).to(self.device)

    def autocast(self, *, enabled: bool = True) -> Any:
        """Return the context in which convolutions and products are in bfloat16."""
        return self.torch.autocast(self.device, dtype=self.torch.bfloat16, enabled=enabled)

    def compiled(self, network: Any) -> Any:
        """Compile a network; with --quick by a backend that takes seconds instead of minutes."""
        return self.torch.compile(network, backend="aot_eager" if self.bench.quick else "inductor")

    def training(self, name: str, images: np.ndarray, classes: int, *, train: bool, half: bool):
        """Return steps that train all parameters, eager and compiled."""
        torch = self.torch
        pixels, target = self.pixels(images), self.target(labels_of(len(images), classes))

        def work(*, compiled: bool) -> Work:
            network = self.network(name, classes).train(train)
            parameters = list(network.parameters())
            fused = self.device == "cuda"
            optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, fused=fused)
            run = self.compiled(network) if compiled else network

            def call() -> None:
                optimizer.zero_grad(set_to_none=True)
                with self.autocast(enabled=half):
                    loss = torch.nn.functional.cross_entropy(run(pixels), target)
                loss.backward()
                optimizer.step()

            return Work(call, self.wait)

        return {"torch": work(compiled=False), "torch.compile": work(compiled=True)}


def compared(bench: Bench, build: Callable[[Torch], dict[str, Work]]) -> dict[str, Work]:
    """Return the functions that ``build`` makes in torch; none, and a note, without torch."""
    try:
        return build(Torch(bench))
    except Skip as why:
        bench.note(str(why))
    except Exception as error:  # noqa: BLE001 - tljax can be measured
        bench.note(f"without torch: {error!r}")
    return {}


# The parts.


def measure_device(bench: Bench) -> None:
    """Record the device, the versions, and the FLOP rate of a large matrix product."""
    names = ("jax", "jaxlib", "optax", "numpy", "torch", "torchvision", "timm", "grain")
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "flax": flax.__version__,
    }
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    stats = jax.devices()[0].memory_stats()
    bench.save(
        versions={**versions, "flax": flax.__version__},
        devices=[str(device) for device in jax.devices()],
        memory_stats=stats and {key: int(value) for key, value in stats.items()},
        cores=os.cpu_count(),
    )
    side = 256 if bench.quick else 8192
    for title, dtype, precision in (
        ("bfloat16", "bfloat16", "default"),
        ("tensorfloat32", "float32", "tensorfloat32"),
        ("float32", "float32", "highest"),
    ):
        # Random numbers, because zeros draw less power and are faster.
        key = jax.random.key(0)
        a, b = (jax.random.normal(k, (side, side)).astype(dtype) for k in jax.random.split(key))
        with jax.default_matmul_precision(precision):
            product = bench.compile(f"product in {title}", jax.jit(jnp.matmul), a, b)
        call = partial(product, a, b)
        bench.turns(
            f"product in {title}", {"tljax": Work(call, jax.block_until_ready)}, 1, 2 * side**3
        )


REFERENCE_CASES = tuple(
    (name, height, width)
    for name in ("resnet18", "resnet50")
    for height, width in ((97, 128), (224, 224))
)
REFERENCE_CLASSES = 100


def write_references() -> None:
    """Write logits computed in float64 on a CPU, by the convolutions of XLA."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", val=True)
    references: dict[str, np.ndarray] = {}
    for name, height, width in REFERENCE_CASES:
        model = replace(build_model(name, REFERENCE_CLASSES), dtype="float64")
        variables = variables_of(model)
        references[f"{name} digest"] = np.array(tree_digest(variables))
        variables = jax.tree.map(lambda x: x.astype(np.float64), variables)
        images = images_of(2, height, width) / 255
        with backend("xla"):
            logits = jax.jit(partial(forward, model))(variables, images)
        references[f"{name} {height}x{width}"] = np.asarray(logits)
    np.savez_compressed(REFERENCES, **references)  # pyright: ignore[reportArgumentType]
    print(f"{REFERENCES.name}: {REFERENCES.stat().st_size} bytes")


def check_logits(bench: Bench) -> None:
    """Compare the logits of two networks at two sizes with the references."""
    references = np.load(REFERENCES)
    rows: dict[str, Any] = {}
    for name, height, width in REFERENCE_CASES:
        if bench.quick and (name, height) != ("resnet18", 97):
            continue
        model = build_model(name, REFERENCE_CLASSES)
        variables = variables_of(model)
        if tree_digest(variables) != references[f"{name} digest"]:
            raise ValueError(
                "this NumPy draws other weights than the references have: run --write-references"
            )
        expected = references[f"{name} {height}x{width}"]
        variables, images = on_device((variables, images_of(2, height, width)))
        for dtype, precision in (
            ("float32", "highest"),
            ("bfloat16", "default"),
            ("float32", "default"),
        ):
            if (dtype, precision, height) == ("float32", "default", 97):
                continue
            cast = replace(model, dtype=dtype)
            title = f"{name} {height}x{width} {dtype} {precision}"
            with jax.default_matmul_precision(precision):
                run = bench.compile(title, jax.jit(partial(forward, cast)), variables, images)
            logits = np.asarray(run(variables, images), np.float64)
            # JSON has no NaN, so a logit that is NaN counts as an error of 1.
            error = float(np.nan_to_num(np.abs(logits - expected), nan=np.inf).max())
            error = min(error / float(np.abs(expected).max()), 1.0)
            strict = precision == "highest" or dtype == "bfloat16"
            tolerance = TOLERANCE[dtype] if strict else None
            rows[title] = {
                "error": error,
                "tolerance": tolerance,
                "passed": None if tolerance is None else error <= tolerance,
            }
            bench.save(logits=rows)


def time_training(
    bench: Bench,
    name: str,
    count: int,
    *,
    batch_norm: bool = False,
    dtype: str = "bfloat16",
    rival: str | None = None,
) -> None:
    """Time a step that trains all parameters, with running or batch statistics."""
    model = replace(build_model(name), dtype=dtype)
    variables, images = variables_of(model), images_of(count, bench.size, bench.size)
    training = frozenset(model.stage_names) if batch_norm else frozenset()
    ours = training_step(bench, name, model, variables, images, training=training)
    others: dict[str, Work] = {}
    if rival:
        half = dtype == "bfloat16"
        others = compared(
            bench, lambda torch: torch.training(rival, images, 1000, train=batch_norm, half=half)
        )
    title = f"{name} step, {'batch' if batch_norm else 'running'} statistics, {dtype}, {count}"
    bench.turns(title, {"tljax": ours, **others}, count, bench.flops(name))


def time_step(bench: Bench, *, batch_norm: bool) -> None:
    """Time a step that trains all parameters, compared with torch."""
    name = bench.network
    time_training(bench, name, bench.batch(256), batch_norm=batch_norm, rival=name)


def time_suffix(bench: Bench) -> None:
    """Time a step of the last stage and the head, with and without cached activations."""
    model = replace(build_model(bench.network), dtype="bfloat16")
    variables, count = variables_of(model), bench.batch(256)
    images = images_of(count, bench.size, bench.size)
    before = jax.jit(lambda v, x: apply(model, v, x, stop="layer4").value)
    entering = before(on_device(variables), images)
    step = partial(training_step, bench, model=model, variables=variables)
    work = {
        "suffix cached": step("suffix cached", images=entering, table=SUFFIX, start="layer4"),
        "suffix": step("suffix", images=images, table=SUFFIX),
        "everything": step("everything", images=images),
    }
    bench.turns(f"{model.name} layer4 and head, bfloat16, {count}", work, count)


def time_inference(bench: Bench) -> None:
    """Time inference, compared with torch and with the weights folded by its compiler."""
    model, count = replace(build_model(bench.network), dtype="bfloat16"), bench.batch(256)
    images = images_of(count, bench.size, bench.size)
    variables, pixels = on_device((variables_of(model), images))
    run = bench.compile(model.name, jax.jit(partial(forward, model)), variables, pixels)

    def in_torch(torch: Torch) -> dict[str, Work]:
        torch.torch._inductor.config.freezing = True
        seen = torch.pixels(images)

        def work(run: Any) -> Work:
            def call() -> Any:
                with torch.torch.no_grad(), torch.autocast():
                    return run(seen)

            return Work(call, torch.wait)

        network = torch.network(bench.network).eval().requires_grad_(requires_grad=False)
        return {"torch": work(network), "torch.compile": work(torch.compiled(network))}

    work = {"tljax": Work(partial(run, variables, pixels), jax.block_until_ready)}
    title = f"{model.name} inference, bfloat16, {count}"
    bench.turns(title, {**work, **compared(bench, in_torch)}, count, bench.flops(model.name))


def time_attack(bench: Bench) -> None:
    """Time ten steps of PGD, compared with the same loop in torch."""
    count, steps, epsilon = bench.batch(64), 2 if bench.quick else 10, 4 / 255
    images = images_of(count, bench.size, bench.size).astype(np.float32) / 255
    labels = labels_of(count, 1000)
    size = 2.5 * epsilon / steps

    def in_torch(torch: Torch, *, half: bool) -> dict[str, Work]:
        start, target = torch.pixels(images), torch.target(labels)
        low, high = (start - epsilon).clamp(0, 1), (start + epsilon).clamp(0, 1)

        def work(run: Any) -> Work:
            def call() -> Any:
                x = start
                for _ in range(steps):
                    x = x.detach().requires_grad_()
                    with torch.autocast(enabled=half):
                        logits = run(x)
                        loss = torch.torch.nn.functional.cross_entropy(
                            logits, target, reduction="sum"
                        )
                    (gradient,) = torch.torch.autograd.grad(loss, x)
                    x = (x.detach() + size * gradient.sign()).clamp(low, high)
                return x

            return Work(call, torch.wait)

        network = torch.network(bench.network).eval().requires_grad_(requires_grad=False)
        # The compiler takes most of a minute: once is enough.
        compiled = {"torch.compile": work(torch.compiled(network))} if half else {}
        return {"torch": work(network), **compiled}

    for dtype, precision in (("bfloat16", "default"), ("float32", "tensorfloat32")):
        model = replace(build_model(bench.network), dtype=dtype)
        variables = on_device(variables_of(model))
        attacked = jax.jit(
            lambda v, x, y, key, model=model: pgd(
                Partial(partial(forward, model), v),
                *(x, y, key),
                epsilon=epsilon,
                num_steps=steps,
                step_size=size,
                random_start=False,
            )
        )
        args = (variables, *on_device((images, labels)), jax.random.key(0))
        with jax.default_matmul_precision(precision):
            run = bench.compile(f"pgd {dtype}", attacked, *args)
        ours = Work(partial(run, *args), jax.block_until_ready)
        others = compared(bench, partial(in_torch, half=dtype == "bfloat16"))
        name = dtype if precision == "default" else precision
        title = f"{model.name} PGD-{steps}, {name}, {count}"
        bench.turns(title, {"tljax": ours, **others}, count)


def time_augmentation(bench: Bench) -> None:
    """Time the augmentation of uint8 images on the device."""
    count, size = bench.batch(256), bench.size
    height, width = size * 8 // 7, size * 32 // 21
    images = on_device(images_of(count, height, width))
    crops, shapes = Crops(0, 0, AugmentConfig()), np.tile([height, width], (count, 1))
    boxes = crops.boxes(np.arange(count), shapes, Preprocess().with_size(size))
    boxes = on_device(pixel_boxes(boxes, shapes))
    args = images, jnp.arange(count, dtype=jnp.int32), epoch_key(0, 0), boxes
    for title, config in (
        ("crop and flip", AugmentConfig()),
        ("crop, flip and RandAugment of 2 layers", AugmentConfig(randaugment_layers=2)),
    ):
        run = partial(augment, size=size, config=config)
        program = bench.compile(title, jax.jit(lambda *a, run=run: run(*a[:3], boxes=a[3])), *args)
        work = Work(partial(program, *args), jax.block_until_ready)
        bench.turns(f"{title}, {count}", {"tljax": work}, count)


def time_input(bench: Bench) -> None:
    """Time the decoding of JPEGs of 500 x 375 pixels: one thread, all cores, and the loader."""
    from PIL import Image

    decode = import_module("tljax.data.decode").decode
    rng = np.random.default_rng(0)
    files = []
    for _ in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    cores, normal = os.cpu_count() or 1, Preprocess()
    files *= 1 if bench.quick else 64
    alone = files[: 16 if bench.quick else 128]

    def threaded() -> None:
        with ThreadPoolExecutor(cores) as pool:
            for _ in pool.map(partial(decode, preprocess=normal), files):
                pass

    def one() -> None:
        for data in alone:
            decode(data, normal)

    bench.turns("decode, one thread", {"tljax": Work(one, lambda _: None)}, len(alone))
    bench.turns(f"decode, {cores} threads", {"tljax": Work(threaded, lambda _: None)}, len(files))
    try:
        loader, sources = map(import_module, ("tljax.data.loader", "tljax.data.sources"))
    except ImportError as error:
        bench.note(f"no loader: {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.jpg") for i in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        source = sources.open_images(paths)

        def load() -> None:
            for _ in loader.load_batches(source, normal, batch_size=bench.batch(256)):
                pass

        bench.turns("loader, threads", {"tljax": Work(load, lambda _: None)}, len(files))


def time_precisions(bench: Bench) -> None:
    """Time a step in float32, with full precision and with tensorfloat32."""
    model, count = build_model(bench.network), bench.batch(128)
    variables, images = variables_of(model), images_of(count, bench.size, bench.size)
    work = {}
    for precision in ("tensorfloat32", "highest"):
        with jax.default_matmul_precision(precision):
            work[precision] = training_step(bench, precision, model, variables, images)
    title = f"{model.name} step in float32, {count}"
    bench.turns(title, work, count, bench.flops("highest"))


def time_small(bench: Bench) -> None:
    """Time ResNet-18, compared with torch."""
    time_training(bench, "resnet18", bench.batch(256), rival="resnet18")


def time_depthwise(bench: Bench) -> None:
    """Time EfficientNet-Lite0, compared with timm."""
    rival = "tf_efficientnet_lite0"
    time_training(bench, "efficientnet_lite0", bench.batch(256), rival=rival)


def time_probe(bench: Bench) -> None:
    """Time the L2 sweep of a linear probe, after compilation."""
    n, d, classes = (200, 32, 5) if bench.quick else (10_000, 2048, 100)
    rng = np.random.default_rng(0)
    labels = labels_of(n, classes)
    spectrum = np.arange(1, d + 1, dtype=np.float32) ** -0.5
    latent = rng.standard_normal((n, d), np.float32)
    latent += 0.4 * rng.standard_normal((classes, d), np.float32)[labels]
    mixing = rng.standard_normal((d, d), np.float32) / np.float32(d**0.5)
    features = np.maximum((latent * spectrum) @ mixing, 0)
    features = (features - features.mean(0)) / features.std(0)
    values = np.logspace(-6, 5, 3 if bench.quick else 45)

    def call() -> Any:
        return fit_logistic(features, labels, values, num_classes=classes)

    bench.turns(f"probe, {len(values)} of L2", {"tljax": Work(call, jax.block_until_ready)}, n)
    fit = call()
    bench.save(
        iterations=int(np.asarray(fit.iterations).sum()),
        converged=int(np.asarray(fit.converged).sum()),
        values=len(values),
    )


class Part(NamedTuple):
    """The function that measures a part, and the seconds that it takes on a GPU."""

    run: Callable[[Bench], None]
    seconds: int


PARTS = {
    "device": Part(measure_device, 25),
    "logits": Part(check_logits, 60),
    "step": Part(partial(time_step, batch_norm=False), 100),
    "suffix": Part(time_suffix, 60),
    "batch-statistics": Part(partial(time_step, batch_norm=True), 110),
    "inference": Part(time_inference, 60),
    "attack": Part(time_attack, 100),
    "augmentation": Part(time_augmentation, 35),
    "input": Part(time_input, 25),
    "precisions": Part(time_precisions, 150),
    "efficientnet": Part(time_depthwise, 240),
    "resnet18": Part(time_small, 60),
    "probe": Part(time_probe, 60),
}


# One process per part, and one that supervises them.


def run_part(name: str, out: Path, *, quick: bool, compare: bool) -> None:
    bench = Bench(name, out, quick=quick, compare=compare)
    try:
        PARTS[name].run(bench)
        bench.save(status="done")
    except Exception as error:  # noqa: BLE001 - the record states any error
        bench.save(status="failed", error=repr(error)[:2000])


def nvidia_smi(*fields: str) -> dict[str, str] | None:
    """Query the driver about the first GPU; None without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = run.stdout.splitlines()[0].split(",")
    return dict(zip(fields, map(str.strip, values), strict=True))


class Supervisor:
    """Runs the parts, stops those that take too long, and keeps the JSON file up to date."""

    def __init__(self, out: Path, *, minutes: float, quick: bool, compare: bool) -> None:
        self.out, self.quick = out, quick
        self.options = ["--quick"] * quick + ["--alone"] * (not compare)
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes
        gpu = nvidia_smi("name", "driver_version", "clocks.max.sm", "power.limit", "memory.total")
        self.report: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "quick": quick,
            "driver": gpu,
            "parts": {},
        }

    @property
    def remaining(self) -> float:
        """Return the remaining seconds."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Write the report so far."""
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        write(self.out, self.report)

    def run(self, name: str) -> None:
        """Run one part, and again without torch if its process died."""
        estimate = 5 if self.quick else PARTS[name].seconds
        if estimate > self.remaining:
            reason = f"takes about {estimate} s, and {self.remaining:.0f} s are left"
            print(f"{name}: skipped: {reason}", flush=True)
            self.report["parts"][name] = {"status": "skipped", "error": reason}
            self.save()
            return
        print(f"{name}: about {estimate} s of the remaining {self.remaining:.0f} s", flush=True)
        record = self._child(name, 3 * estimate if not self.quick else 120, ())
        if record["status"] == "died" and self.remaining > estimate / 2:
            print(f"{name}: {record['error'][-500:]}: running again without torch", flush=True)
            again = self._child(name, 2 * estimate, ("--alone",))
            self.report["parts"][name] = {**again, "with_torch": record}
        self.save()

    def _child(self, name: str, limit: float, options: tuple[str, ...]) -> dict[str, Any]:
        began = time.monotonic()
        end = min(began + limit, self.end)
        samples: list[dict[str, str]] = []
        record: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder, "part.json"), Path(folder, "stderr")
            command = [sys.executable, __file__, "--part", name, "--out", str(out), *options]
            command += self.options
            # JAX and torch share the GPU, so JAX must not reserve its memory.
            settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

            def read() -> dict[str, Any]:
                text = out.read_text("utf-8") if out.exists() else "{}"
                return {"status": "running", **json.loads(text)}

            with log.open("w") as errors:
                process = subprocess.Popen(
                    command, env=settings | os.environ, stderr=errors, start_new_session=True
                )
                late = False
                try:
                    while process.poll() is None and not late:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(0.2 if self.quick else 2)
                        self.report["parts"][name] = read()
                        self.save()
                        late = time.monotonic() > end
                        if sample := nvidia_smi("clocks.sm", "power.draw", "temperature.gpu"):
                            samples.append(sample)
                finally:  # also ends its children, such as the compilers of torch
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            record = read()
            message = log.read_text("utf-8", errors="replace").strip()
        if record["status"] == "running":
            record["status"] = "out of time" if late else "died"
            end = f"stopped after {limit:.0f} s" if late else f"exit status {process.returncode}"
            record["error"] = f"{end}: {message[-2000:]}"
        record["seconds"] = round(time.monotonic() - began, 1)
        record["clocks"] = medians(samples)
        self.report["parts"][name] = record
        self.save()
        return record

    def finish(self) -> None:
        """Add the share of the measured peak to every rate, and print the table."""
        parts = self.report["parts"]
        products = parts.get("device", {}).get("turns", {}).get("product in bfloat16", {})
        peak = products.get("tljax", {}).get("teraflops_per_second")
        turns = [turn for part in parts.values() for turn in part.get("turns", {}).values()]
        for row in (row for turn in turns for row in turn.values()):
            if peak and "teraflops_per_second" in row:
                row["of_the_bfloat16_product"] = row["teraflops_per_second"] / peak
        self.save()
        print(table(self.report))


def medians(samples: list[dict[str, str]]) -> dict[str, Any]:
    """Return the median and maximum of each numeric field."""
    results: dict[str, Any] = {}
    for field in samples[0] if samples else ():
        with contextlib.suppress(ValueError):
            values = [float(sample[field]) for sample in samples]
            results[field] = {"median": statistics.median(values), "max": max(values)}
    return results


def table(report: dict[str, Any]) -> str:
    """Format the numbers of a report, one per line."""
    parts = report["parts"]
    device = next((p["device"] for p in parts.values() if "device" in p), "no device")
    lines = [f"{device}, {report['seconds']:.0f} s"]
    for name, part in parts.items():
        memory = part.get("peak_memory_bytes")
        lines.append(
            f"{name}: {part['status']} in {part.get('seconds', 0):.0f} s"
            + (f", {memory / 2**30:.1f} GiB" if memory else "")
            + (f": {part['error'].splitlines()[-1][-160:]}" if part.get("error") else "")
        )
        for title, row in part.get("logits", {}).items():
            passed = {True: "passed", False: "FAILED", None: "no tolerance"}[row["passed"]]
            lines.append(f"    {title:44} {row['error']:.1e} {passed}")
        for title, rows in part.get("turns", {}).items():
            lines.append(f"  {title}")
            for side, row in rows.items():
                if "seconds" not in row:
                    lines.append(f"    {side:14} {row.get('error', 'not finished')[:120]}")
                    continue
                line = f"    {side:14} {1e3 * row['seconds']:9.2f} ms"
                line += f" {row['examples_per_second']:10.0f} /s"
                if (rate := row.get("teraflops_per_second")) is not None:
                    line += f" {rate:7.1f} TFLOP/s"
                if (share := row.get("of_the_bfloat16_product")) is not None:
                    line += f" {share:5.0%}"
                if "takes_times_as_long" in row:
                    line += f" x {row['takes_times_as_long']:.2f}"
                lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=8, help="time limit; a part starts only if it fits in"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("accelerator.json"), help="the file of the report"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="the parts to measure; by default all",
    )
    parser.add_argument("--quick", action="store_true", help="tiny inputs, to try it on a CPU")
    parser.add_argument("--alone", action="store_true", help="do not compare with torch")
    parser.add_argument("--part", choices=PARTS, help="measure one part in this process")
    parser.add_argument(
        "--write-references", action="store_true", help="write the reference logits, on a CPU"
    )
    args = parser.parse_args()
    if args.write_references:
        write_references()
    elif args.part:
        run_part(args.part, args.out, quick=args.quick, compare=not args.alone)
    else:
        supervisor = Supervisor(
            args.out, minutes=args.minutes, quick=args.quick, compare=not args.alone
        )
        for name in args.parts:
            supervisor.run(name)
        supervisor.finish()


if __name__ == "__main__":
    main()
