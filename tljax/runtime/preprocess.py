"""Preprocessing of images that weights expect. Imports no JAX: processes that decode need none."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from tljax.runtime.settings import Normalization


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of images that a set of weights expects; it is saved with the weights.

    Resizing and cropping happen on the host: the short side is resized to ``resize`` and the
    central ``size`` x ``size`` square is cropped. The model itself then normalizes values ``x`` to
    ``(x - mean) / std``, on the device, and reverses the channel order for networks that were
    trained on BGR. Pixels of 8 or 16 bits are values in [0, 1]; floating point pixels are taken as
    they are. Caffe's ``x * 255 - mean_bgr`` corresponds to ``std = 1/255``; values in [-1, 1]
    correspond to ``mean = std = 0.5``.

    Attributes:
        size: side of the square input image, in pixels.
        resize: length of the short side before the crop, in pixels; at least ``size``.
        interpolation: Pillow filter of the resize.
        mean: mean of each channel; of three channels in RGB order.
        std: standard deviation of each channel, likewise.
        channel_order: order of the input channels of the first convolution; ``bgr`` only for three
            channels.
        dtype: dtype of the images that are fed to the network: ``uint8`` in [0, 255], or
            ``float32`` for images that need more than 8 bits.
    """

    size: int = 224
    resize: int = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    dtype: Literal["uint8", "float32"] = "uint8"

    @property
    def channels(self) -> int:
        """Return the number of channels of an image."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the height, width and number of channels of the input image."""
        return self.size, self.size, self.channels

    def with_size(self, size: int) -> Self:
        """Return the same preprocessing for another input size, in pixels.

        The crop keeps its fraction of the image.
        """
        return replace(self, size=size, resize=max(size, round(size * self.resize / self.size)))

    def with_channels(self, channels: int) -> Self:
        """Return the same preprocessing for another number of channels.

        Each has the average mean and standard deviation of the old ones.
        """
        if channels == self.channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        statistics = {"mean": (mean,) * channels, "std": (std,) * channels}
        return replace(self, **statistics, channel_order="rgb")

    def with_normalization(self, name: Normalization) -> Self:
        """Return the same resizing and cropping with one of `NORMALIZATIONS`."""
        other = NORMALIZATIONS[name]
        return replace(self, mean=other.mean, std=other.std, channel_order=other.channel_order)

    @property
    def normalization(self) -> Normalization | None:
        """Return the name of the normalization, or None if it is not in `NORMALIZATIONS`."""
        return next(
            (name for name in NORMALIZATIONS if self.with_normalization(name) == self), None
        )


INCEPTION_PREPROCESS = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Preprocessing of networks that expect values in [-1, 1]."""

CAFFE_PREPROCESS = Preprocess(
    mean=(123.68 / 255, 116.779 / 255, 103.939 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
    channel_order="bgr",
)
"""Preprocessing of networks that expect BGR values in [0, 255] minus the mean, as in Caffe."""


CLIP_PREPROCESS = Preprocess(
    interpolation="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
"""Normalization of OpenAI's CLIP (Radford et al. 2021, arXiv 2103.00020)."""

NORMALIZATIONS: dict[Normalization, Preprocess] = {
    "torch": Preprocess(),
    "tf": INCEPTION_PREPROCESS,
    "caffe": CAFFE_PREPROCESS,
    "clip": CLIP_PREPROCESS,
}
"""Common normalizations: the first three by their names in keras.applications.

Only ``mean``, ``std`` and ``channel_order`` of each `Preprocess` are used.
"""
