"""The tables in the README of the benchmarks are those of the committed results."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_readme_has_the_tables_of_the_committed_results():
    printed = subprocess.run(
        [sys.executable, BENCHMARKS / "tables.py"], capture_output=True, text=True, check=True
    ).stdout
    assert "| resnet50 | step |" in printed
    assert printed in (BENCHMARKS / "README.md").read_text("utf-8")
