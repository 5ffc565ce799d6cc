"""Export of networks as StableHLO, which runs with JAX alone, and as ONNX."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Float, Num

from tljax.models import apply
from tljax.models.convolution import backend
from tljax.pretrained.network import Card, Pretrained
from tljax.runtime.errors import RequestError, VerificationError
from tljax.runtime.files import atomic_write
from tljax.runtime.packages import install_command
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.types import Array

_Network = Callable[[Num[Array, "batch size size channels"]], Float[jax.Array, "batch outputs"]]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms that a StableHLO file can be exported for."""


def export_stablehlo(
    folder: Path,
    pretrained: Pretrained,
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Write a network with its parameters as StableHLO, to run with JAX alone.

    The folder holds ``model.stablehlo``, serialized by `jax.export`: a function from images
    ``[batch, size, size, channels]``, uint8 RGB unless the preprocessing says otherwise, to outputs
    ``[batch, outputs]`` float32, such as logits;
    ``model.json`` with the task, the names of the classes and the preprocessing; and
    ``predict.py``, which predicts for image files with JAX, flatbuffers (for `jax.export`), NumPy
    and Pillow. The function of a backbone returns features ``[batch, features]`` instead. The
    folder of a backbone, or of a network for other images than RGB of 8 bits, has no
    ``predict.py``.

    The task in ``model.json`` has a ``kind`` of `Task`; with the ``thresholds`` of labels, from
    which on the sigmoid of an output means that the label applies; or with the ``mean``, ``scale``
    and ``units`` of numbers, which are ``outputs * scale + mean``.

    JAX versions of at least the following six months can read the file
    (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).

    Args:
        folder: output folder; created if missing. Existing files of these names are replaced.
        pretrained: the network to export.
        batch: fixed batch size; None allows any.
        platforms: platforms to compile for, out of `PLATFORMS`.

    Raises:
        RequestError: a platform is unknown, or the folder cannot be written.
    """
    if unknown := sorted({*platforms} - {*PLATFORMS}):
        known = ", ".join(PLATFORMS)
        raise RequestError(f"cannot export for {', '.join(unknown)}; the platforms are {known}")
    preprocess = pretrained.model.preprocess
    rows = batch if batch is not None else jax_export.symbolic_shape("batch")[0]
    images = jax.ShapeDtypeStruct((rows, *preprocess.shape), preprocess.dtype)
    exported = jax_export.export(jax.jit(_logits(pretrained)), platforms=platforms)(images)
    contents = {
        "model.stablehlo": bytes(exported.serialize()),
        "model.json": json.dumps(_description(pretrained), indent=2).encode(),
    }
    if pretrained.model.num_classes and _reads_pictures(preprocess):
        script = files("tljax.pretrained").joinpath("predict_exported.txt")
        contents["predict.py"] = script.read_bytes()
    for name, data in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(data)


def export_onnx(path: Path, pretrained: Pretrained) -> None:
    """Write a network with its parameters as an ONNX file, checked with ONNX Runtime.

    The input ``images`` is ``[batch, size, size, channels]``, uint8 RGB unless the preprocessing
    says otherwise, with any batch size. The output
    ``logits`` is ``[batch, classes]`` float32, ``outputs`` for a regression and ``features`` for a
    backbone. The file's metadata holds the content of `export_stablehlo`'s ``model.json``, under
    ``tljax``. jax2onnx builds the graph.

    Args:
        path: output file; an existing one is replaced.
        pretrained: the network to export.

    Raises:
        RequestError: jax2onnx is not installed or does not support an operation, or the file
            cannot be written.
        VerificationError: the logits of ONNX Runtime and JAX differ by more than 1e-4 of the
            largest absolute logit; nothing is written.
    """
    try:
        import jax2onnx  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - optional
        import onnxruntime  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        advice = install_command("jax2onnx")
        raise RequestError(f"an ONNX file needs the package {error.name}: {advice}") from error
    function = _logits(pretrained)
    output = "outputs" if pretrained.card.task.kind == "regression" else "logits"
    output = output if pretrained.model.num_classes else "features"
    preprocess = pretrained.model.preprocess
    try:
        proto = jax2onnx.to_onnx(
            _with_plain_operations(function),
            [jax.ShapeDtypeStruct(("batch", *preprocess.shape), np.dtype(preprocess.dtype))],
            model_name=pretrained.model.name,
            input_names=["images"],
            output_names=[output],
        )
    except NotImplementedError as error:
        reason = str(error).split("\n")[0]
        raise RequestError(
            f"jax2onnx cannot translate {pretrained.model.name}: {reason:.200}"
        ) from error
    proto.metadata_props.add(key="tljax", value=json.dumps(_description(pretrained)))
    data = proto.SerializeToString()

    images = np.random.default_rng(0).integers(0, 256, (2, *preprocess.shape), np.uint8)
    if preprocess.dtype == "float32":
        images = images.astype(np.float32) / np.float32(255)
    expected = np.asarray(jax.jit(function)(images))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    difference = np.abs(session.run([output], {"images": images})[0] - expected).max()
    if not difference <= 1e-4 * max(1.0, float(np.abs(expected).max())):
        raise VerificationError(
            f"{path}: ONNX Runtime's logits differ from JAX's by {difference:.2g}; nothing written"
        )
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def _reads_pictures(preprocess: Preprocess) -> bool:
    return preprocess.channels == 3 and preprocess.dtype == "uint8"


def _logits(pretrained: Pretrained) -> _Network:
    """Return the function that maps images in [0, 255] to logits, or to a backbone's features."""
    model, variables, _ = pretrained
    return lambda images: apply(model, variables, images).logits.astype(jnp.float32)


def _description(pretrained: Pretrained) -> dict[str, Any]:
    model, _, card = pretrained
    geometry = {key: asdict(model.preprocess)[key] for key in ("size", "resize", "interpolation")}
    if not _reads_pictures(model.preprocess):
        geometry |= {"channels": model.preprocess.channels, "dtype": model.preprocess.dtype}
    return {
        "model": model.name,
        "task": _task_description(card),
        "classes": card.classes,
        "preprocess": geometry,  # the exported function normalizes
        "source": card.source,
        "licence": card.licence,
    }


def _task_description(card: Card) -> dict[str, Any]:
    """Return the kind and the settings of a task, with the values that empty ones stand for."""
    task, count = card.task, len(card.classes)
    settings = {"kind": task.kind}
    if task.kind == "multilabel":
        return settings | {"thresholds": task.thresholds or (0.5,) * count}
    if task.kind == "regression":
        mean, scale = task.mean or (0.0,) * count, task.scale or (1.0,) * count
        return settings | {"mean": mean, "scale": scale, "units": task.units or ("",) * count}
    return settings


# --- rewriting of operations that jax2onnx does not support --------------------------------------


def _with_plain_operations(function: Callable[[Array], jax.Array]) -> Callable[[Array], jax.Array]:
    """Rewrite a function to use XLA's plain operations and no four-dimensional pooling.

    A jaxpr interpreter: https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html.
    """

    def rewritten(images: Array) -> jax.Array:
        with backend("xla"):
            closed = jax.make_jaxpr(function)(images)
        return _evaluate(closed.jaxpr, closed.consts, [images])[0]

    return rewritten


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    variables: list[Any] = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(variables, [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        params, primitive = equation.params, equation.primitive
        inputs = list(map(read, equation.invars))
        if primitive.name in ("jit", "custom_jvp_call", "custom_vjp_call"):
            inner = params.get("jaxpr") or params["call_jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif primitive.name == "reduce_window_max":
            outputs = [_max_pool(inputs[0], params)]
        else:
            outputs = primitive.bind(*inputs, **params)
            outputs = outputs if primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))


def _max_pool(x: jax.Array, params: dict[str, Any]) -> jax.Array:
    """Compute max pooling as the maximum of shifted slices, one dimension after the other."""
    windows, strides = params["window_dimensions"], params["window_strides"]
    for axis, (window, stride) in enumerate(zip(windows, strides, strict=True)):
        if window == 1:
            continue
        pads = [(0, 0)] * x.ndim
        pads[axis] = params["padding"][axis]
        x = jnp.pad(x, pads, constant_values=-jnp.inf)
        count = (x.shape[axis] - window) // stride + 1
        ends = [(start, start + stride * (count - 1) + 1) for start in range(window)]
        x = reduce(jnp.maximum, [jax.lax.slice_in_dim(x, *end, stride, axis) for end in ends])
    return x
