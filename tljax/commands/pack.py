"""The command ``tljax pack``: write a data set to files that are read without decoding."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tljax.commands import cli
from tljax.data.options import LabelOptions
from tljax.runtime.errors import RequestError
from tljax.runtime.ranges import Amount, Range, Share
from tljax.runtime.settings import settings


@dataclass(frozen=True)
class Config(cli.Output):
    """Pack a data set into files that are read without decoding, by --data packed:OUT.

    Whole images are resized so that their short side has --size pixels. The training and the
    validation part are written, with all labels, names and groups. A command that was interrupted
    is resumed by the same command.

    Attributes:
        data: Data set to pack: a folder, a table, digits, tfds:NAME or hf:NAME; with --verify a
            folder that was packed.
        out: Folder to write; new, empty, or packed from the same images with the same options.
        size: Short side of the packed images, in pixels. Networks that resize to this size get the
            pixels that they would get from the files.
        interpolation: Filter to resize with; that of the networks that are trained on the images.
        format: Form to store them in: raw pixels, which need no decoding, or jpeg files of
            quality 95, which are about seven times smaller.
        workers: Number of processes that decode images; 0 decodes in threads.
        val_fraction: Fraction of the images, or of the groups, that are for validation if the data
            has no validation part.
        labels: Options of the labels of the data set.
        verify: Read a packed folder, and compare the checksums of its files.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    size: Annotated[int, Range(4, 10_000)] = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    format: Literal["raw", "jpeg"] = "raw"
    workers: Amount = 0
    val_fraction: Share = 0.2
    labels: cli.Labels = field(default_factory=LabelOptions)
    verify: bool = False

    conditions = (
        (
            "size interpolation format workers val_fraction " + " ".join(settings(LabelOptions())),
            lambda s: not s.verify,
            "with --verify",
        ),
        *cli.SPLIT_CONDITIONS,
    )


def run(config: Config) -> dict[str, Any]:
    """Pack, or verify, and print the number of images, their size and what could not be read."""
    if config.verify:
        return verify(config)
    if config.out is None:
        raise RequestError("name the folder to write: tljax pack DATA OUT")
    from tljax.data.pack import pack
    from tljax.data.packed_splits import is_packed
    from tljax.data.sources import open_splits

    if is_packed(config.data):
        raise RequestError(f"{config.data} is packed already: pack the images it was made of")
    splits = open_splits(config.data, val_fraction=config.val_fraction, labels=config.labels)
    header = pack(
        splits,
        config.out,
        source=config.data,
        size=config.size,
        interpolation=config.interpolation,
        encoding=config.format,
        workers=config.workers,
    )
    names = [*splits.train.names, *(splits.val.names if splits.val is not splits.train else ())]
    skipped = {names[i]: reason for i, reason in header.unreadable.items()}
    size = sum(shard.bytes for shard in header.shards)
    lines = [
        *header.notes,
        f"{header.examples - len(skipped)} images of {size / 1e6:.1f} MB in {config.out}",
        *(f"not read: {name}: {reason}" for name, reason in skipped.items()),
        f"open them with --data packed:{config.out}",
    ]
    print("\n".join(lines))
    return {
        "out": str(config.out),
        "images": header.examples - len(skipped),
        "bytes": size,
        "size": header.size,
        "skipped": skipped,
    }


def verify(config: Config) -> dict[str, Any]:
    """Compare the checksums of all files of a packed folder; print those that differ."""
    from tljax.data.packed import find_damage, open_packed
    from tljax.data.packed_splits import packed_folder
    from tljax.runtime.progress import track

    if config.out:
        raise RequestError(f"--verify reads one folder: leave out {config.out}")
    folder = packed_folder(config.data)
    shards = open_packed(folder)[0].header.shards
    total = sum(shard.bytes for shard in shards) // 2**20
    tracked = track(
        shards, description="verify", total=total, unit="MiB", size=lambda one: one.bytes // 2**20
    )
    problems = [line for shard in tracked if (line := find_damage(folder, shard))]
    print("\n".join(f"problem: {line}" for line in problems) or f"{folder} is as it was packed")
    return {"shards": len(shards), "problems": problems}
