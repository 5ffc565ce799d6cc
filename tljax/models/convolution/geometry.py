"""Where the windows of a convolution or a pool stand."""

from typing import Literal, NamedTuple

from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

Padding = int | Literal["SAME"] | Pads
"""Zeros on each side, as torch pads; TensorFlow's SAME, which depends on the size and is not
symmetric; or ``((top, bottom), (left, right))``."""

Kernel = int | tuple[int, int]
"""The side of a square kernel, or its height and width."""

NO_PADS: Pads = ((0, 0), (0, 0))


class Geometry(NamedTuple):
    """What a convolution is besides its two arrays. Hashable: static in every program."""

    stride: int = 1
    pads: Pads = NO_PADS
    groups: int = 1

    def pointwise(self, window: tuple[int, ...]) -> bool:
        """Whether it is a matrix product of the pixels that the stride leaves."""
        return tuple(window) == (1, 1) and self.groups == 1 and self.pads == NO_PADS


class Window(NamedTuple):
    """What a pool looks at: the side of its square, stride and padding. Hashable."""

    k: int
    stride: int
    pads: Pads


def resolve(padding: Padding, size: tuple[int, ...], window: tuple[int, ...], stride: int) -> Pads:
    """Return the zeros on each side of an image of ``size`` (height and width, as ``window``)."""
    if padding == "SAME":
        height, width = lax.padtype_to_pads(size, window, (stride, stride), "SAME")
        return tuple(height), tuple(width)  # pyright: ignore[reportReturnType]
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    return padding
