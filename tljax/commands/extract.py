"""The command ``tljax extract``: write the features of images to a file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tljax.commands import cli
from tljax.data.options import LabelOptions
from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write
from tljax.runtime.packages import install_command

if TYPE_CHECKING:
    import numpy as np

    from tljax.features.extract import Outputs


@dataclass(frozen=True)
class Config(cli.Common, cli.Distributed):
    """Write the features of images to a file, with the name and the class of each image.

    A .npz file holds the arrays names, labels and embeddings; a .parquet file the columns name,
    label and embedding; a .safetensors file the array embeddings, with names and labels as JSON
    lists in its metadata. Labels are names of classes; images without class folders have none.

    Attributes:
        data: Images: a folder of images or of class folders; or a table, shards, the URL of a
            bucket, digits, tfds:NAME, hf:NAME or packed:FOLDER, of which the validation part is
            used if there is one.
        out: File to write: .npz, .parquet (needs pyarrow) or .safetensors.
        stage: Stage whose output is written; the default writes the pooled features.
        maps: Write feature maps in full instead of their averages over all positions. A .parquet
            file holds them flattened, and their shape in its metadata.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    out: Path
    labels: cli.Labels = field(default_factory=LabelOptions)
    stage: str = "pool"
    maps: bool = False

    conditions = cli.LABEL_CONDITIONS


def run(config: Config) -> dict[str, Any]:
    """Write the file, and print its shape and the images that could not be read."""
    from tljax.data.examples import format_labels
    from tljax.data.folders import exists, expand_path, open_folder
    from tljax.data.loader import require_readable_image
    from tljax.data.shards import is_shards
    from tljax.data.sources import open_labeled
    from tljax.features.extract import compute_features
    from tljax.runtime.parallel import is_main_process
    from tljax.train.run_directory import skipped_lines, skipped_rows

    out, folder = config.out, expand_path(config.data.removeprefix("hf:"))
    if out.suffix not in _SUFFIXES:
        raise RequestError(f"--out {out}: choose a file that ends with {', '.join(_SUFFIXES)}")
    if out.suffix == ".parquet" and not find_spec("pyarrow"):
        advice = f"{install_command('pyarrow')}, or choose .npz"
        raise RequestError(f"--out {out} needs pyarrow: {advice}")
    if out.is_dir():
        raise RequestError(f"--out {out} is a folder: name a file")
    is_folder = exists(folder) and folder.is_dir()
    if is_folder and out.resolve().is_relative_to(folder.resolve()):
        raise RequestError(f"--out {out} is among the images of {folder}: choose another folder")
    network = config.load()
    model, position = network.model, network.model.position(config.stage)
    stop = (*model.stage_names, None)[position + 1]
    without_labels = is_folder and not is_shards(config.data)
    source = open_folder(folder) if without_labels else open_labeled(config.data, config.labels)
    # Opened before the features are computed, as it may not be possible to write there.
    with atomic_write(out) if is_main_process() else nullcontext() as temporary:
        features = compute_features(
            *network[:2], source, config.loading, stop=stop, description="extract"
        )
        require_readable_image(source, features.skipped)
        if not config.maps:
            features = features.pooled(model.stages[position].prefix_tokens)
        texts: dict[str, list[Any]] = {
            "names": [source.names[i] for i in features.indices.tolist()]
        }
        if source.classes:
            texts["labels"] = format_labels(source, features.labels)
        with _all_rows(features, temporary) as values:
            if temporary:
                _write(temporary, out.suffix, texts, values)
    shape = " x ".join(map(str, features.share.shape))
    print(f"{shape} embeddings, of {config.stage} of {network.model.name}, written to {out}")
    for line in skipped_lines(source, features.skipped):
        print(line)
    return {
        "out": str(out),
        "stage": config.stage,
        "shape": list(features.share.shape),
        "labeled": "labels" in texts,
        "skipped": dict(skipped_rows(source, features.skipped)),
    }


_SUFFIXES = (".npz", ".parquet", ".safetensors")


@contextmanager
def _all_rows(features: "Outputs", beside: Path | None) -> "Iterator[np.ndarray]":
    """Give the process that writes the rows of all, from a file on the same disk, not in memory.

    Args:
        features: the features of this process.
        beside: path in the folder of the file; None in processes that do not write.
    """
    import numpy as np

    if features.rows is None:
        yield features.values
        return
    with TemporaryFile(dir=beside and beside.parent) as file:
        for values, rows in features.share.blocks():
            if beside:
                for value, row in zip(values, rows.tolist(), strict=True):
                    file.seek(row * value.nbytes)
                    file.write(value.tobytes())
        file.flush()
        shape, dtype = features.share.shape, features.values.dtype
        yield np.memmap(file, dtype, "r", shape=shape) if beside else features.values


def _write(path: Path, suffix: str, texts: dict[str, Any], values: "np.ndarray") -> None:
    if suffix == ".npz":
        import numpy as np

        arrays: dict[str, Any] = {name: np.array(text) for name, text in texts.items()}
        with path.open("wb") as file:
            np.savez(file, **arrays, embeddings=values)
    elif suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        columns: dict[str, Any] = {name.removesuffix("s"): text for name, text in texts.items()}
        rows = values.reshape(len(values), -1)
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])
        shape = {"shape": json.dumps(values.shape[1:])}
        parquet.write_table(pa.table(columns, metadata=shape), path)
    else:
        from safetensors.numpy import save_file

        metadata = {name: json.dumps(text) for name, text in texts.items()}
        if sum(map(len, metadata.values())) > 90_000_000:  # readers refuse a header of 100 MB
            raise RequestError("too many names for a .safetensors file: choose .npz or .parquet")
        save_file({"embeddings": values}, path, metadata)
