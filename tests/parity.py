"""The parity table: every network, from every format, against its reference implementation.

python tests/parity.py benchmarks/results/parity.json [NAME ...]

The file is written after every pair; pairs that it already contains are skipped.
"""

import json
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # read when keras is imported

import jax
import numpy as np
from networks import difference, random_images
from references import REFERENCES, Reference

from tljax.models import Model, apply, normalize
from tljax.pretrained import Pretrained, load_pretrained
from tljax.runtime.files import atomic_write
from tljax.runtime.types import Variables
from tljax.train.run_directory import environment


@partial(jax.jit, static_argnums=0)
def _captured(model: Model, variables: Variables, images: np.ndarray) -> dict[str, jax.Array]:
    return apply(model, variables, images, capture=model.stage_names).captured


def stage_differences(pretrained: Pretrained, reference: Reference) -> dict[str, float]:
    """Return the largest relative difference of each stage's output over all sizes."""
    model, variables, _ = pretrained
    worst = dict.fromkeys(model.stage_names, 0.0)
    for size in reference.sizes:
        images = random_images(2, *size)
        captured = _captured(model, variables, images)
        expected = reference.stages(np.asarray(normalize(images, model.preprocess)))
        assert tuple(expected) == model.stage_names
        for stage, value in expected.items():
            worst[stage] = max(worst[stage], difference(captured[stage], value))
    return worst


def main(path: Path, names: list[str]) -> None:
    """Write one JSON object, and a line per pair to stderr."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["pairs"] if path.exists() else []
    known = {(row["model"], row["layout"]) for row in rows}
    for (name, layout), build in REFERENCES.items():
        if (names and name not in names) or (name, layout) in known:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = build(Path(folder) / "reference")
            pretrained = load_pretrained(reference.weights, model=name)
            stages = stage_differences(pretrained, reference)
        worst = max(stages.values())
        rows.append(
            {
                "model": name,
                "layout": layout,
                "sizes": reference.sizes,
                "largest": worst,
                "stages": {stage: float(f"{value:.1e}") for stage, value in stages.items()},
            }
        )
        print(f"{name:36}{layout:22}{worst:.1e}", file=sys.stderr, flush=True)
        with atomic_write(path) as temporary:
            temporary.write_text(
                json.dumps({"environment": environment(), "pairs": rows}, indent=1)
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
