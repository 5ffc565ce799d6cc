"""The command ``tljax weights``: list, verify, import and export pretrained weights."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tljax.commands import cli
from tljax.runtime.settings import Kind, Normalization

if TYPE_CHECKING:
    from tljax.pretrained import Pretrained


@dataclass(frozen=True)
class List(cli.Output):
    """List the catalog of published weights.

    Attributes:
        name: Part of the names to list, such as dinov3; by default all are listed.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME_PART")] = ""


@dataclass(frozen=True, kw_only=True)
class Source(cli.Extended):
    """Options of the weights to read.

    Attributes:
        weights: Weights to read: a catalog name, hub id, file, saved folder or run directory, also
            in a bucket (gs://).
        model: Architecture that the weights must have; by default it is read from the weights.
    """

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verify(Source):
    """Compare a network layer by layer with its reference implementation in PyTorch or Keras.

    Attributes:
        reference: Reference weights: a folder or hub id that transformers can load, or a file that
            Keras can; by default those that the weights were ported from.
    """

    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Import(Source):
    """Port weights to a file in tljax's own format, with their card.

    Attributes:
        path: File to write, .safetensors.
        normalization: Normalization of the input that a bare weights file expects, by its name in
            keras.applications, or clip for CLIP's; by default the usual one of the architecture and
            file format.
        task: Meaning of the outputs of the network, where its file does not say it, such as
            multilabel for logits of sigmoids; by default classification.
    """

    path: Annotated[Path, tyro.conf.Positional]
    normalization: Normalization | None = None
    task: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class Export(Source):
    """Write a network, pretrained or fine-tuned, for other programs.

    Attributes:
        path: File to write: .safetensors, .pth, .weights.h5, .h5 or .onnx; or the folder to write,
            for the layouts huggingface and stablehlo.
        layout: Format to write: the keys of torchvision, timm, huggingface, keras,
            efficientnet_pytorch, open_clip, vision_transformer, big_vision or tljax; or onnx; or
            stablehlo, a program that runs with JAX alone. By default onnx for a path that ends in
            .onnx, otherwise torchvision, or else the first one that the network has.
    """

    path: Annotated[Path, tyro.conf.Positional]
    layout: str | None = None


Config = List | Verify | Import | Export


def run(command: Config) -> dict[str, Any]:
    """Run a subcommand and print its result."""
    from tljax.pretrained import CATALOG, export, save
    from tljax.pretrained.deploy import export_onnx, export_stablehlo
    from tljax.pretrained.verify import TOLERANCE, verify
    from tljax.runtime.errors import RequestError, VerificationError
    from tljax.runtime.tables import format_table

    if isinstance(command, List):
        part = command.name.lower()
        entries = {name: entry for name, entry in CATALOG.items() if part in name.lower()}
        if not entries:
            raise RequestError(
                f"no name of the catalog contains '{command.name}'; `tljax weights list` shows all"
            )
        header = ("name", "network", "crop", "resize", "filter", "norm", "classes", "top-1")
        header = (*header, "license", "file")
        rows = [
            (
                name,
                entry.model,
                entry.preprocess.size,
                entry.preprocess.resize,
                entry.preprocess.interpolation,
                entry.preprocess.normalization,
                entry.classes,
                "" if entry.top1 is None else f"{entry.top1:.2f}",
                entry.licence,
                entry.source.rpartition("/" if entry.source.startswith("https:") else "\n")[2],
            )
            for name, entry in entries.items()
        ]
        print(format_table(header, rows, left=len(header)))
        return {"weights": {name: asdict(entry) for name, entry in entries.items()}}
    options: dict[str, Any] = {"model": command.model}
    if isinstance(command, Import):
        options |= {"normalization": command.normalization, "task": command.task}
    pretrained = command.read(command.weights, **options)
    cli.print_notes(pretrained)
    if isinstance(command, Verify):
        layers = verify(pretrained, command.reference)
        worst: dict[str, float] = {}
        for layer in layers:
            stage = layer.layer.split("/")[0]
            worst[stage] = max(worst.get(stage, 0), layer.difference)
        print(format_table(("", ""), [(stage, f"{worst[stage]:.1e}") for stage in worst]))
        if wrong := [one for one in layers if not one.difference <= TOLERANCE or one.reason]:
            first = wrong[0]
            detail = f": {first.reason}" if first.reason else ""
            raise VerificationError(
                f"{first.layer} is the first of {len(wrong)} layers that differ from the "
                f"reference, by {first.difference:.1e} of its largest value{detail}"
            )
        print(f"every layer agrees to {TOLERANCE:g} of its largest value")
        return {"layers": {layer.layer: layer.difference for layer in layers}}
    if isinstance(command, Import):
        save(command.path, pretrained)
    elif (layout := command.layout or default_layout(command.path, pretrained)) == "stablehlo":
        export_stablehlo(command.path, pretrained)
    elif layout == "onnx":
        export_onnx(command.path, pretrained)
    else:
        export(command.path, pretrained, layout)
    print(f"{pretrained.model.name} written to {command.path}")
    return {"model": pretrained.model.name, "path": str(command.path)}


def default_layout(path: Path, pretrained: "Pretrained") -> str:
    """Return the layout to export to if none is named."""
    from tljax.pretrained.tables.layouts import LAYOUTS

    if path.suffix == ".onnx":
        return "onnx"
    layouts = list(LAYOUTS.get(pretrained.model.name, ["tljax"]))
    return "torchvision" if "torchvision" in layouts else layouts[0]
