"""Kernel sizes, strides and padding of convolutions and pools."""

from typing import Literal, NamedTuple

from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

Padding = int | Literal["SAME"] | Pads
"""Padding of a map: pixels on every side, as in torch; ``"SAME"``, as in TensorFlow, which depends
on the size and is not always symmetric; or ``((top, bottom), (left, right))``."""

Kernel = int | tuple[int, int]
"""Side of a square kernel, or its height and width."""

NO_PADS: Pads = ((0, 0), (0, 0))


class Geometry(NamedTuple):
    """Static (hashable) parameters of a convolution."""

    stride: int = 1
    pads: Pads = NO_PADS
    groups: int = 1

    def pointwise(self, window: tuple[int, ...]) -> bool:
        """Return True if a kernel of this size is a matrix product at (strided) pixels."""
        return tuple(window) == (1, 1) and self.groups == 1 and self.pads == NO_PADS


class Window(NamedTuple):
    """Static (hashable) parameters of a pool: side of the square window, stride and padding."""

    k: int
    stride: int
    pads: Pads


def resolve_padding(
    padding: Padding, size: tuple[int, ...], window: tuple[int, ...], stride: int
) -> Pads:
    """Convert padding to ``((top, bottom), (left, right))``.

    Args:
        padding: any kind of padding.
        size: height and width of the map.
        window: height and width of the kernel or window.
        stride: stride in both directions.
    """
    if padding == "SAME":
        height, width = lax.padtype_to_pads(size, window, (stride, stride), "SAME")
        return tuple(height), tuple(width)  # pyright: ignore[reportReturnType]
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    return padding
