"""Lists, verifies, imports and exports pretrained weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tljax.commands import cli
from tljax.runtime.settings import Normalization

if TYPE_CHECKING:
    from tljax.pretrained import Pretrained


@dataclass(frozen=True)
class List(cli.Output):
    """List the catalog of published weights."""


@dataclass(frozen=True)
class Verify(cli.Extended):
    """Compare a port with its reference implementation (torch or keras), layer by layer."""

    weights: Annotated[str, tyro.conf.Positional]
    """A catalog name, hub id, file, saved folder or run directory."""
    model: str | None = None
    """The architecture that the weights must be; found out if not given."""
    reference: str | None = None
    """A folder or hub id that transformers can load, or a file that Keras can; by default what the
    weights came from."""


@dataclass(frozen=True)
class Import(cli.Extended):
    """Port weights once and keep them in tljax's own format, with their card."""

    weights: Annotated[str, tyro.conf.Positional]
    """A catalog name, hub id, file or saved folder."""
    path: Annotated[Path, tyro.conf.Positional]
    """The .safetensors file to write."""
    model: str | None = None
    """The architecture that the weights must be; found out if not given."""
    normalization: Normalization | None = None
    """What a bare file expects; by default what is usual for its architecture and format."""


@dataclass(frozen=True)
class Export(cli.Extended):
    """Write a network, fine-tuned ones too, for other programs."""

    weights: Annotated[str, tyro.conf.Positional]
    """A catalog name, hub id, file, saved folder or run directory."""
    path: Annotated[Path, tyro.conf.Positional]
    """The file to write, .safetensors, .pth, .weights.h5, .h5 or .onnx; for huggingface and
    stablehlo a folder."""
    model: str | None = None
    """The architecture that the weights must be; found out if not given."""
    layout: str = "torchvision"
    """Whose keys to use: torchvision, timm, huggingface, keras, efficientnet_pytorch or tljax; or
    onnx, or stablehlo: a compiled-ready network that runs with JAX alone."""


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as what stands in them."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def load(command: Verify | Import | Export) -> "Pretrained":
    """The network, and on stderr what was assumed of it."""
    from tljax.pretrained import load_pretrained

    normalization = command.normalization if isinstance(command, Import) else None
    found = load_pretrained(
        command.weights, model=command.model, normalization=normalization, **command.modules()
    )
    cli.say_notes(found)
    return found


def run(command: List | Verify | Import | Export) -> dict[str, Any]:
    """Does what the subcommand says."""
    from tljax.pretrained import CATALOG, export, save
    from tljax.pretrained.deploy import export_onnx, export_stablehlo
    from tljax.runtime.errors import VerificationError

    if isinstance(command, List):
        print_table(
            ("name", "network", "crop", "resize", "filter", "norm", "top-1", "licence", "file"),
            [
                (
                    name,
                    entry.model,
                    entry.preprocess.size,
                    entry.preprocess.resize,
                    entry.preprocess.interpolation,
                    entry.preprocess.normalization,
                    f"{entry.top1:.2f}",
                    entry.licence,
                    entry.source.rpartition("/")[2]
                    if entry.source.startswith("https:")
                    else entry.source,
                )
                for name, entry in CATALOG.items()
            ],
        )
        return {"weights": {name: asdict(entry) for name, entry in CATALOG.items()}}
    if isinstance(command, Verify):
        from tljax.pretrained.verify import TOLERANCE, verify

        layers = verify(load(command), command.reference)
        wrong = [layer for layer in layers if not layer.difference <= TOLERANCE or layer.reason]
        for stage in dict.fromkeys(layer.layer.split("/")[0] for layer in layers):
            worst = max(x.difference for x in layers if x.layer.split("/")[0] == stage)
            print(f"{stage:12}{worst:.1e}")
        if wrong:
            first = wrong[0]
            detail = f": {first.reason}" if first.reason else ""
            raise VerificationError(
                f"{first.layer} is the first of {len(wrong)} layers that differ from the "
                f"reference, by {first.difference:.1e} of its scale{detail}"
            )
        print(f"every layer agrees to {TOLERANCE:g} of its scale")
        return {"layers": {layer.layer: layer.difference for layer in layers}}
    pretrained = load(command)
    if isinstance(command, Import):
        save(command.path, pretrained)
    elif command.layout == "stablehlo":
        export_stablehlo(command.path, pretrained)
    elif command.layout == "onnx":
        export_onnx(command.path, pretrained)
    else:
        export(command.path, pretrained, command.layout)
    print(f"{pretrained.model.name} written to {command.path}")
    return {"model": pretrained.model.name, "path": str(command.path)}


def main() -> None:
    """Run ``tljax weights``."""
    cli.main(List | Verify | Import | Export, run)
