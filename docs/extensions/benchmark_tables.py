"""The directive ``benchmark``: a table of measurements, made from benchmarks/results/*.json.

    ```{benchmark} recipes
    ```

The argument names a function of this file or of benchmarks/tables.py that returns Markdown.
"""

import json
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


def _reports(pattern: str) -> list[dict[str, Any]]:
    """Return the JSON results whose file names match, in the order of their names."""
    return [
        json.loads(path.read_text("utf-8"))
        for path in sorted((ROOT / "benchmarks" / "results").glob(pattern))
    ]


def recipes() -> str:
    """Return the accuracy and the processor seconds of every training recipe, per data set."""
    reports = _reports("recipes-*.json")
    names = list(dict.fromkeys(name for report in reports for name in report["recipes"]))
    rows = []
    for report in reports:
        cells = [
            f"{row['val_top1_mean']:.3f}, {row['processor_seconds_median']:.0f} s"
            for row in (report["recipes"][name] for name in names)
        ]
        train, val = report["examples"]
        epochs = max(row["epochs"] for row in report["recipes"].values())
        rows.append([report["data"], f"{train:,} / {val:,}", epochs, *cells])
    header = ["data", "training / validation images", "epochs", *(f"`{name}`" for name in names)]
    return tables.table(header, rows)


def epochs() -> str:
    """Return the cost of an epoch for every number of frozen stages, cached and not cached."""
    rows: dict[str, dict[str, tuple[str, str]]] = {}
    for report in _reports("epochs-*.json"):
        for entry in report["epochs"]:
            cells = f"{entry['flops_of_full']:.1%}", f"{entry['processor_seconds']:.2f}"
            kind = "not cached" if entry["cache"] == "none" else "cached"
            rows.setdefault(entry["freeze_to"], {})[kind] = cells
    header = ["`--freeze-to`", "FLOPs, cached", "s, cached", "FLOPs, not cached", "s, not cached"]
    return tables.table(
        header,
        [
            [
                f"`{stage}`" if stage else "nothing",
                *row.get("cached", ("", "")),
                *row["not cached"],
            ]
            for stage, row in rows.items()
        ],
    )


TABLES = {
    "recipes": recipes,
    "epochs": epochs,
    **{maker.__name__: maker for maker in tables.TABLES},
}


class BenchmarkTable(SphinxDirective):
    """Insert the table whose name is the argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown of the table."""
        name = self.arguments[0]
        if name not in TABLES:
            raise self.error(f"no benchmark table is called '{name}'; known: {', '.join(TABLES)}")
        self.env.note_dependency(str(ROOT / "benchmarks" / "tables.py"))
        for path in (ROOT / "benchmarks" / "results").glob("*.json"):
            self.env.note_dependency(str(path))
        container = nodes.container()
        self.state.nested_parse(StringList(TABLES[name]().splitlines(), name), 0, container)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("benchmark", BenchmarkTable)
    return {"parallel_read_safe": True}
