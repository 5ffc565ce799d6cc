"""Compare the speed of a forward pass, input gradient and training step with torch; print JSON.

The report has seconds per batch. On a GPU, time several calls at once, in bfloat16:

    python benchmarks/speed.py --weights microsoft/resnet-50 --batch-size 32
    python benchmarks/speed.py --model resnet50 --batch-size 256 --dtype bfloat16 \
        --calls 20 --compiled
"""

import sys

import tljax

tljax.configure("bfloat16" if "bfloat16" in sys.argv else "float32")  # before JAX is imported

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import torch
import torch._inductor.config
import tyro
from flax_networks import in_flax
from ours import random_batch, repeated_step
from peers import (
    TorchNetwork,
    device,
    environment,
    finish,
    random_pretrained,
    stages_by_key,
    take_turns,
    torch_pixels,
)
from torch.utils.flop_counter import FlopCounterMode

from tljax.models import apply
from tljax.pretrained import Pretrained, load_pretrained
from tljax.runtime.settings import Dtype

Question = Literal["forward", "input-gradient", "step", "step-batch-norm", "suffix"]

Work = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Config:
    """Seconds per batch in tljax and torch, and their ratio."""

    questions: tuple[Question, ...] = ("forward", "input-gradient", "step", "suffix")
    """``step`` trains all parameters with running batch-norm statistics, ``step-batch-norm`` with
    those of the batch; ``suffix`` trains the stages after ``--freeze-to``, with and without cached
    activations."""
    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights, as in tljax train."""
    model: str | None = None
    """A network with random weights, instead of --weights."""
    freeze_to: str | None = None
    """The last frozen stage of ``suffix``; by default the last stage and the head train."""
    image_size: int | None = None
    """Side of the square images, in pixels; by default what the weights expect."""
    batch_size: int = 16
    """Images per batch."""
    dtype: Dtype = "float32"
    """The dtype of the computation; in torch by autocast."""
    compiled: bool = False
    """Also compare with torch.compile, which folds frozen weights into the forward pass."""
    onnx: bool = False
    """Also compare forward with onnxruntime, in float32; pip install onnxruntime onnxscript."""
    keras: bool = False
    """Also compare forward and step with Keras on JAX, in float32 and with random weights."""
    flax: bool = False
    """Also compare them with plain Flax; only for networks of depthwise convolutions."""
    rounds: int = 5
    """Number of timed rounds."""
    calls: int = 1
    """Number of calls that are timed together."""


class Bench:
    """One network in both frameworks, and the functions to time for each question."""

    def __init__(self, config: Config, pretrained: Pretrained) -> None:
        self.config = config
        self.model = replace(pretrained.model, dtype=config.dtype)
        self.variables = jax.tree.map(jnp.asarray, pretrained.variables)
        self.pretrained = pretrained
        images, labels = self.batch = random_batch(self.model, config.batch_size)
        self.images, self.labels = jnp.asarray(images), jnp.asarray(labels)
        self.pixels = torch_pixels(images)
        self.target = torch.tensor(labels, dtype=torch.long).to(device())
        self.network = TorchNetwork(pretrained)

    def questions(self) -> dict[Question, Callable[[], Work]]:
        """Return the function that prepares each question."""
        return {
            "forward": self.forward,
            "input-gradient": self.input_gradient,
            "step": lambda: self.step(batch_norm=False),
            "step-batch-norm": lambda: self.step(batch_norm=True),
            "suffix": self.suffix,
        }

    def forward(self) -> Work:
        """Prepare the computation of logits."""
        run = jax.jit(lambda v, x: apply(self.model, v, x).logits)
        ours: Work = {"tljax": lambda: run(self.variables, self.images)}
        if self.config.keras:
            ours["keras"] = self.in_keras("forward")
        if self.config.flax:
            ours["flax"], _ = in_flax(self.model, *self.batch)
        if self.config.onnx:
            ours["onnxruntime"] = self.in_onnxruntime()

        def in_torch(network: torch.nn.Module) -> Callable[[], Any]:
            def call() -> torch.Tensor:
                with torch.inference_mode(), self.autocast():
                    return network(self.pixels)

            return call

        return self.turns(ours, in_torch)

    def input_gradient(self) -> Work:
        """Prepare the gradient of the loss with respect to the images, as attacks compute it."""

        def loss(x: jax.Array, variables: Any) -> jax.Array:
            logits = apply(self.model, variables, x).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, self.labels).sum()

        run = jax.jit(jax.grad(loss))

        def in_torch(network: torch.nn.Module) -> Callable[[], Any]:
            def call() -> Any:
                pixels = self.pixels.clone().requires_grad_()
                with self.autocast():
                    loss = torch.nn.functional.cross_entropy(
                        network(pixels), self.target, reduction="sum"
                    )
                loss.backward()
                return pixels.grad

            return call

        return self.turns({"tljax": lambda: run(self.images, self.variables)}, in_torch)

    def step(self, *, batch_norm: bool) -> Work:
        """Prepare a step that trains all parameters."""
        training = frozenset(self.model.stage_names) if batch_norm else frozenset[str]()
        step = partial(repeated_step, self.model, self.variables, *self.batch)
        ours: Work = {"tljax": step(training=training)}
        if self.config.keras and not batch_norm:
            ours["keras"] = self.in_keras("step")
        if self.config.flax and not batch_norm:
            _, ours["flax"] = in_flax(self.model, *self.batch)
        return self.turns(ours, lambda net: self.torch_step(net, batch_norm=batch_norm))

    def suffix(self) -> Work:
        """Prepare a step that trains the last stages."""
        with_params = [name for name in self.model.stage_names if name in self.variables["params"]]
        freeze_to = self.config.freeze_to or with_params[-3]
        start = with_params[with_params.index(freeze_to) + 1]
        stages = self.model.stage_names[self.model.position(start) :]
        table = *((f"{s}/*", 1.0) for s in stages if s in with_params), ("*", 0.0)
        step = partial(repeated_step, self.model, self.variables, *self.batch)
        ours: Work = {
            "tljax cached": step(table=table, start=start),
            "tljax": step(table=table),
            "tljax everything": step(),
        }
        return self.turns(ours, lambda net: self.torch_step(net, stages=stages))

    def in_keras(self, question: Literal["forward", "step"]) -> Callable[[], Any]:
        """Return a function that runs the same network in Keras on JAX."""
        from keras_networks import in_its_own_process

        return in_its_own_process(question, self.model, self.config.batch_size)

    def in_onnxruntime(self) -> Callable[[], Any]:
        """Export the torch network, and return a function that runs it in onnxruntime."""
        import onnxruntime  # pyright: ignore[reportMissingImports] - with --onnx only

        pixels = self.pixels.cpu().contiguous()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            network = copy.deepcopy(self.network).cpu()
            torch.onnx.export(network, (pixels,), path, input_names=["x"], verbose=False)
            session = onnxruntime.InferenceSession(
                path, providers=onnxruntime.get_available_providers()
            )
        return lambda: session.run(None, {"x": pixels.numpy()})

    def torch_step(
        self,
        network: torch.nn.Module,
        *,
        batch_norm: bool = False,
        stages: tuple[str, ...] | None = None,
    ) -> Callable[[], Any]:
        """Return the step in torch; only the parameters of ``stages`` require a gradient."""
        stage_of = stages_by_key(self.pretrained.model)
        trained = []
        for name, parameter in network.named_parameters():
            if stages is None or stage_of[name.partition("network.")[2]] in stages:
                trained.append(parameter.requires_grad_())
        network.train(batch_norm)
        optimizer = torch.optim.SGD(trained, 1e-6, momentum=0.9)

        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = torch.nn.functional.cross_entropy(network(self.pixels), self.target)
            loss.backward()
            optimizer.step()

        return call

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of torch's mixed precision; in float32 it does nothing."""
        if self.config.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device().type, torch.bfloat16)

    def turns(self, ours: Work, in_torch: Callable[[torch.nn.Module], Callable[[], Any]]) -> Work:
        """Repeat each call ``config.calls`` times and wait for the results."""

        def jax_turn(call: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: jax.block_until_ready([call() for _ in range(self.config.calls)])

        def torch_turn(call: Callable[[], Any]) -> Callable[[], None]:
            def turn() -> None:
                for _ in range(self.config.calls):
                    call()
                finish()

            return turn

        work: Work = {name: jax_turn(call) for name, call in ours.items()}
        work["torch"] = torch_turn(in_torch(copy.deepcopy(self.network)))
        if self.config.compiled:
            torch._inductor.config.freezing = True
            network = copy.deepcopy(self.network)
            work["torch.compile"] = torch_turn(in_torch(torch.compile(network)))  # pyright: ignore[reportArgumentType]
        return work


def gflop(network: torch.nn.Module, pixels: torch.Tensor) -> float:
    """Count the GFLOP of a forward pass: all products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(pixels)
    return counter.get_total_flops() / 1e9


def peak(dtype: Dtype) -> float:
    """Measure the GFLOP/s of a large matrix product, the faster of JAX and torch."""
    side = 2048 if device().type == "cpu" else 8192
    matrix = jnp.ones((side, side), dtype)
    torch_matrix = torch.ones((side, side), dtype=getattr(torch, dtype), device=device())
    multiply = jax.jit(jnp.matmul)

    def in_torch() -> None:
        torch.matmul(torch_matrix, torch_matrix)
        finish()

    work = {"tljax": lambda: jax.block_until_ready(multiply(matrix, matrix)), "torch": in_torch}
    rows = take_turns(work, rounds=10)
    return 2 * side**3 / 1e9 / min(row["fastest_seconds"] for row in rows.values())


def main() -> None:
    config = tyro.cli(Config)
    random = config.model and random_pretrained(config.model, 1000)
    pretrained = (random or load_pretrained(config.weights)).with_size(config.image_size)
    bench = Bench(config, pretrained)
    answers: dict[str, Any] = {}
    peak_rate, forward_gflop = peak(config.dtype), gflop(bench.network, bench.pixels)
    for question in config.questions:
        rows: dict[str, Any] = take_turns(bench.questions()[question](), config.rounds)
        for row in rows.values():
            row["images_per_second"] = round(config.batch_size * config.calls / row["seconds"], 2)
            row["tljax_is_times_as_fast"] = round(row["seconds"] / rows["tljax"]["seconds"], 3)
        answers[question] = rows
    report = {
        "environment": environment(),
        "model": pretrained.model.name,
        "weights": "random" if random else Path(config.weights).name,
        "image_size": pretrained.model.preprocess.size,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "calls": config.calls,
        "gflop_of_a_forward_pass": round(forward_gflop, 1),
        "gflop_per_second_of_a_large_product": round(peak_rate, 1),
        "questions": answers,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
