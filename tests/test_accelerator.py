"""The benchmark of one accelerator, run on a CPU: its dependencies and its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "accelerator.py"

# Runs a script as if the packages in ``missing`` were not installed.
WITHOUT = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ImportError(f"{{name}} is not installed")

sys.meta_path.insert(0, Absent())
runpy.run_path({script!r})
"""


def test_it_starts_with_jax_flax_and_optax_alone() -> None:
    missing = {"grain", "tyro", "datasets", "matplotlib", "h5py", "safetensors", "torch", "PIL"}
    code = WITHOUT.format(missing=missing, script=str(SCRIPT))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.slow
def test_a_part_records_its_numbers_and_a_skipped_part_its_reason(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--quick", "--out", out, "--parts", "device"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(out.read_text("utf-8"))
    part = report["parts"]["device"]
    assert part["status"] == "done", part
    assert part["device"] == "cpu"
    assert part["versions"]["jax"]
    row = part["turns"]["product in bfloat16"]["tljax"]
    assert 0 < row["fastest_seconds"] <= row["seconds"] <= row["slowest_seconds"]
    assert f"{row['examples_per_second']:.0f} /s" in printed
    assert not [path for path in tmp_path.iterdir() if path != out]

    subprocess.run([*command, "--minutes", "0"], check=True, capture_output=True)
    part = json.loads(out.read_text("utf-8"))["parts"]["device"]
    assert part["status"] == "skipped"
    assert "0 s are left" in part["error"]
