"""Networks for places without tljax: a StableHLO folder that needs only JAX, and ONNX files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend.core import Jaxpr, Literal

from tljax.models import apply
from tljax.models.convolution import backend
from tljax.pretrained.load import Pretrained
from tljax.runtime.errors import RequestError, VerificationError
from tljax.runtime.files import written_whole
from tljax.runtime.packages import install_command

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_stablehlo(
    folder: Path,
    pretrained: Pretrained,
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes a network, its parameters inside, so that a process with JAX alone can run it.

    The folder holds ``model.stablehlo``, serialised by `jax.export`, which takes images
    ``[batch, size, size, 3]`` uint8 RGB and returns logits ``[batch, classes]`` float32;
    ``model.json`` with the classes and how a photograph is cut to those images; and ``predict.py``,
    which names what is on photographs with JAX, flatbuffers (for `jax.export`), numpy and Pillow.
    A backbone returns its features instead, and has no ``predict.py``.

    JAX reads such a file for at least six months of later versions
    (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).

    Args:
        folder: is made if need be; files in it of these names are replaced.
        pretrained: what to export.
        batch: the number of images in every call; None leaves it to the caller.
        platforms: where the file will run; some of `PLATFORMS`.

    Raises:
        RequestError: there is no such platform, or the folder cannot be written.
    """
    unknown = sorted({*platforms} - {*PLATFORMS})
    if unknown:
        known = ", ".join(PLATFORMS)
        raise RequestError(f"cannot export for {', '.join(unknown)}; the platforms are {known}")
    size = pretrained.model.preprocess.size
    rows = batch if batch is not None else jax_export.symbolic_shape("batch")[0]
    images = jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8)
    exported = jax_export.export(jax.jit(_logits(pretrained)), platforms=platforms)(images)
    contents = {
        "model.stablehlo": bytes(exported.serialize()),
        "model.json": json.dumps(_description(pretrained), indent=2).encode(),
    }
    if pretrained.model.num_classes:
        script = files("tljax.pretrained").joinpath("predict_exported.txt")
        contents["predict.py"] = script.read_bytes()
    for name, data in contents.items():
        with written_whole(folder / name) as temporary:
            temporary.write_bytes(data)


def export_onnx(path: Path, pretrained: Pretrained) -> None:
    """Writes one ONNX file, its parameters inside, and checks what ONNX Runtime makes of it.

    The input ``images`` is ``[batch, size, size, 3]`` uint8 RGB with any batch, the output
    ``logits`` is ``[batch, classes]`` float32, for a backbone ``features``. The classes and how a
    photograph is cut are in the file's metadata, under ``tljax``, as JSON. The graph is made by
    jax2onnx.

    Args:
        path: of the file.
        pretrained: what to export.

    Raises:
        RequestError: jax2onnx is not installed or has no translation for an operation, or the file
            cannot be written.
        VerificationError: ONNX Runtime's logits differ by more than 1e-4 of the largest one from
            JAX's; nothing is written.
    """
    try:
        import jax2onnx  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - optional
        import onnxruntime  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        advice = install_command("jax2onnx")
        raise RequestError(f"an ONNX file needs the package {error.name}: {advice}") from error
    function = _logits(pretrained)
    output = "logits" if pretrained.model.num_classes else "features"
    size = pretrained.model.preprocess.size
    try:
        proto = jax2onnx.to_onnx(
            _in_plain_operations(function),
            [jax.ShapeDtypeStruct(("batch", size, size, 3), np.uint8)],
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

    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    expected = np.asarray(jax.jit(function)(images))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    difference = np.abs(session.run([output], {"images": images})[0] - expected).max()
    if not difference <= 1e-4 * max(1.0, float(np.abs(expected).max())):
        raise VerificationError(
            f"{path}: ONNX Runtime's logits differ from JAX's by {difference:.2g}; nothing written"
        )
    with written_whole(path) as temporary:
        temporary.write_bytes(data)


def _logits(pretrained: Pretrained) -> Callable[[jax.Array], jax.Array]:
    model, variables, _ = pretrained
    return lambda images: apply(model, variables, images).logits.astype(jnp.float32)


def _description(pretrained: Pretrained) -> dict[str, Any]:
    model, _, card = pretrained
    cut = {key: asdict(model.preprocess)[key] for key in ("size", "resize", "interpolation")}
    return {
        "model": model.name,
        "classes": card.classes,
        "preprocess": cut,  # the normalisation is inside the network
        "source": card.source,
        "licence": card.licence,
    }


# --- what jax2onnx has no translation for, in other words ----------------------------------------


def _in_plain_operations(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """The same function of XLA's own operations, and without four-dimensional pooling.

    An interpreter of jaxprs, https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html.
    """

    def rewritten(images: jax.Array) -> jax.Array:
        with backend("xla"):
            closed = jax.make_jaxpr(function)(images)
        return _evaluate(closed.jaxpr, closed.consts, [images])[0]

    return rewritten


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    variables: list[Any] = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(variables, [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        params, primitive = equation.params, equation.primitive
        inputs: list[Any] = [
            v.val if isinstance(v, Literal) else values.get(v) for v in equation.invars
        ]
        inner = None
        if primitive.name in ("jit", "custom_jvp_call", "custom_vjp_call"):
            inner = params.get("jaxpr") or params["call_jaxpr"]
        if inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif primitive.name == "reduce_window_max":
            outputs = [_max_pool(inputs[0], params)]
        else:
            outputs = primitive.bind(*inputs, **params)
            outputs = outputs if primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _max_pool(x: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The maximum of shifted slices, along one dimension after the other."""
    windows, strides = params["window_dimensions"], params["window_strides"]
    for axis, (window, stride) in enumerate(zip(windows, strides, strict=True)):
        if window == 1:
            continue
        pads = [(0, 0)] * x.ndim
        pads[axis] = params["padding"][axis]
        x = jnp.pad(x, pads, constant_values=-jnp.inf)
        count = (x.shape[axis] - window) // stride + 1
        ends = [(start, start + stride * (count - 1) + 1) for start in range(window)]
        slices = [jax.lax.slice_in_dim(x, *end, stride, axis) for end in ends]
        x = slices[0]
        for other in slices[1:]:
            x = jnp.maximum(x, other)
    return x
