"""Preprocessing in the configuration files of transformers and timm, read and written."""

import math
from dataclasses import replace
from typing import Any

from tljax.models.spec import is_number, is_side
from tljax.pretrained.sections import Section
from tljax.runtime.preprocess import Preprocess

_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
_NEAREST = 0  # in the files of EfficientNet, whose networks were trained with bicubic filters

# Image processors of transformers that keep the aspect ratio, with their default resampling.
_PROCESSORS = {"ConvNext": 3, "Bit": 3, "CLIP": 3, "MobileNetV1": 2, "MobileNetV2": 2}
# Image processors of transformers that ignore the aspect ratio.
_SQUEEZING = {"ViT": 2, "DeiT": 3, "Siglip": 3, "DINOv3ViT": 2, "EfficientNet": 3}
# Default image processors by model_type; the others default to ConvNext's.
DEFAULT_PROCESSORS = {
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "vit": "ViT",
    "vit_mae": "ViT",
    "deit": "DeiT",
    "clip": "CLIP",
    "siglip": "Siglip",
    "clip_vision_model": "CLIP",
    "siglip_vision_model": "Siglip",
    "dinov3_vit": "DINOv3ViT",
    "dinov3_convnext": "DINOv3ViT",
    "efficientnet": "EfficientNet",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
}

# Key of tljax in preprocessor_config.json: pixels are numbers, which are taken as they are.
_FLOAT = "tljax_float_images"

# From this size on transformers' ConvNext processor ignores the aspect ratio.
_SQUASHED_FROM_SIDE = 384


def _squeezes(where: str, what: str) -> str:
    """Return a note on a resize that tljax does in another way."""
    return (
        f"{where}: {what} squeezes images into a square; tljax keeps their aspect ratio and crops "
        "the center"
    )


def timm_preprocess(cfg: Section, channels: int) -> tuple[Preprocess, tuple[str, ...]]:
    """Return timm's evaluation transform, and a note on differences.

    It resizes the short side to size / crop_pct, or with ``squash`` both, and crops the center.

    For a network of other channels than RGB, timm keeps the mean and std of RGB; their averages are
    taken.
    """
    mode = cfg.get("crop_mode", lambda v: v in ("center", "squash"), "center or squash", "center")
    _, size, _ = cfg.get(
        "input_size",
        lambda v: (
            isinstance(v, list)
            and v[:1] in ([3], [channels])
            and is_side(v[-1])
            and v[1:] == v[-1:] * 2
        ),
        f"[{channels}, n, n] with n in pixels",
    )
    interpolation = cfg.get(
        "interpolation", lambda value: value in ("bilinear", "bicubic"), "bilinear or bicubic"
    )
    resize = math.floor(size / cfg.get("crop_pct", _is_fraction, "a number above 0, at most 1"))
    mean = cfg.values.get("mean")
    count = 3 if isinstance(mean, list) and len(mean) == 3 else channels
    statistics = _mean_and_std(cfg, "mean", "std", count)
    notes = (_squeezes(cfg.where, "crop_mode 'squash'"),) if mode == "squash" else ()
    return Preprocess(size, resize, interpolation, *statistics).with_channels(channels), notes


def huggingface_preprocess(
    processor: Section, default_kind: str, channels: int
) -> tuple[Preprocess, tuple[str, ...]]:
    """Return the preprocessing of an image processor of transformers, and a note on differences.

    Where the crop removes an odd number of pixels, transformers' crop may lie one pixel nearer to
    the top left: it rounds down, while torchvision, timm and tljax round to even.
    """
    is_float = processor.values.get(_FLOAT) is True
    for key in ("do_resize", "do_normalize", *(() if is_float else ("do_rescale",))):
        processor.get(key, lambda value: value is True, "true", default=True)
    processor.get(
        "rescale_factor", lambda v: is_number(v) and math.isclose(v, 1 / 255), "1/255", 1 / 255
    )
    old, new = "feature_extractor_type", "image_processor_type"
    kind = processor.get(
        old if processor.values.get(new) is None else new,
        lambda value: isinstance(value, str) and value.startswith((*_PROCESSORS, *_SQUEEZING)),
        f"that of {', '.join((*_PROCESSORS, *_SQUEEZING))}",
        default_kind,
    )
    defaults = {**_PROCESSORS, **_SQUEEZING}.items()
    default = next(value for name, value in defaults if kind.startswith(name))
    squeezes = kind.startswith(tuple(_SQUEEZING))
    notes = (_squeezes(processor.where, kind),) if squeezes else ()
    filters, expected = tuple(_PILLOW_FILTERS), "2 or 3"
    if kind.startswith("EfficientNet"):
        filters, expected = (_NEAREST, *filters), "0, 2 or 3"
    resample = processor.get("resample", lambda value: value in filters, expected, default)
    if resample == _NEAREST:
        resample = default
        notes += (f"{processor.where}: resample 0 takes nearest pixels; tljax resizes bicubically",)
    edge = _side(processor, "size", *(("height", "width") if squeezes else ("shortest_edge",)))
    if squeezes and not processor.values.get("do_center_crop", kind.startswith("DeiT")):
        crop, resize = edge, edge
    elif kind.startswith("ConvNext"):
        processor.get("do_center_crop", lambda value: value is False, "false", default=False)
        share = processor.get("crop_pct", _is_fraction, "a number above 0, at most 1", 224 / 256)
        crop, resize = edge, math.floor(edge / share)
        if edge >= _SQUASHED_FROM_SIDE:
            raise processor.error(
                f"from {_SQUASHED_FROM_SIDE} px on this image processor ignores the aspect ratio, "
                "which tljax does not support; choose a smaller size"
            )
    else:
        processor.get("do_center_crop", lambda value: value is True, "true", default=True)
        crop, resize = _side(processor, "crop_size", "height", "width"), edge
        if crop > resize:
            raise processor.error(f"crop_size {crop} is more than size {resize}; correct it")
    interpolation: Any = _PILLOW_FILTERS[resample]
    mean, std = _mean_and_std(processor, "image_mean", "image_std", channels)
    if kind.startswith("EfficientNet"):
        processor.get("rescale_offset", lambda value: value is False, "false", default=False)
        if processor.get("include_top", lambda v: isinstance(v, bool), "true or false", True):
            std = tuple(value**2 for value in std)  # it divides by them twice
    preprocess = Preprocess(crop, resize, interpolation, mean, std)
    return (replace(preprocess, dtype="float32") if is_float else preprocess), notes


def _side(processor: Section, key: str, *names: str) -> int:
    """Return a length in pixels, given as a number or as a dict with these names."""

    def is_valid(value: object) -> bool:
        sides = [value.get(name) for name in names] if isinstance(value, dict) else [value]
        return all(map(is_side, sides)) and len(set(sides)) == 1

    expected = "n or {" + ", ".join(f"'{name}': n" for name in names) + "} with n in pixels"
    value = processor.get(key, is_valid, expected)
    return value[names[0]] if isinstance(value, dict) else value


def _mean_and_std(section: Section, mean: str, std: str, channels: int) -> tuple[Any, Any]:
    def fits(value: object) -> bool:
        return isinstance(value, list) and len(value) == channels and all(map(is_number, value))

    numbers = f"{channels} number{'s' * (channels > 1)}"
    return (
        tuple(section.get(mean, fits, numbers)),
        tuple(section.get(std, lambda v: fits(v) and min(v) > 0, f"{numbers} above 0")),
    )


def _is_fraction(value: object) -> bool:
    return is_number(value) and 0.01 <= value <= 1  # pyright: ignore[reportOperatorIssue]


def image_processor(preprocess: Preprocess) -> dict[str, Any]:
    """Return the preprocessor_config.json of a preprocessing."""
    filters = {name: number for number, name in _PILLOW_FILTERS.items()}
    processor: dict[str, Any] = {
        # The one processor of transformers that resizes and crops like tljax at any size.
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resize},
        "resample": filters[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocess.size, "width": preprocess.size},
        "do_rescale": preprocess.dtype == "uint8",
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }
    if preprocess.dtype != "uint8":
        processor[_FLOAT] = True
    return processor
