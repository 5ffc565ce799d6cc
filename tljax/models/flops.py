"""Count the operations of a program before it is compiled."""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax


def count_flops(traced: jax.stages.Traced) -> float:
    """Count the operations of matrix products and convolutions, two for each multiply-add.

    Args:
        traced: a jitted function, traced for its arguments.

    Returns:
        Their number over all devices. Loops count as often as they run; those whose number of
        iterations depends on the data count once.
    """
    return _flops(traced.jaxpr.jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inputs, output = [var.aval for var in equation.invars], equation.outvars[0].aval
        match name:
            case "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                length = prod(inputs[0].shape[axis] for axis in contracted)
                total += 2 * output.size * length
            case "conv_general_dilated":
                channels = inputs[1].shape[params["dimension_numbers"].rhs_spec[0]]
                # Of a dilated input, only every so many values are not zero.
                dilation = prod(params["lhs_dilation"])
                total += 2 * output.size * inputs[1].size / channels / dilation
            case "tljax_convolution":
                total += _convolution(output, inputs[1])
            case "tljax_convolution_input_gradient":
                total += _convolution(inputs[0], inputs[1])
            case "tljax_convolution_kernel_gradient":
                total += _convolution(inputs[1], output)
            case "cond":
                total += max(_flops(branch.jaxpr) for branch in params["branches"])
            case "scan":
                total += params["length"] * _flops(params["jaxpr"].jaxpr)
            case _:
                total += sum(map(_flops, _inner(params)))
    return total


def _convolution(output: Any, kernel: Any) -> float:
    """Return the operations of a convolution, or of one of its two gradients."""
    return 2 * output.size * kernel.size / kernel.shape[-1]


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the programs that an operation runs."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)  # closed or open
            if hasattr(inner, "eqns"):
                yield inner
