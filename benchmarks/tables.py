"""The results of the last runs as Markdown, for README.md beside this file.

python benchmarks/tables.py
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def results(kind: str) -> Iterable[dict[str, Any]]:
    """The JSON files of one benchmark, in the order of their names."""
    for path in sorted(RESULTS.glob(f"{kind}-*.json")):
        yield json.loads(path.read_text("utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def batch(report: dict[str, Any]) -> str:
    """Images at once, and their side."""
    return f"{report['batch_size']} x {report['image_size']} px"


def ratio(value: float) -> str:
    """What one looks for."""
    return f"**{value:.2f}**"


def speed() -> str:
    """Seconds of a batch beside torch's."""
    rows = []
    for report in results("speed"):
        for question, turns in report["questions"].items():
            theirs = turns["torch"]["seconds"]
            for name, suffix in (("tljax", ""), ("tljax cached", " cached")):
                if name in turns:
                    ours = turns[name]["seconds"]
                    what = [report["model"], question + suffix, batch(report)]
                    rows.append([*what, f"{ours:.2f}", f"{theirs:.2f}", ratio(theirs / ours)])
    header = ["network", "question", "batch", "tljax, s", "torch, s", "times as fast"]
    return table(header, rows)


def attacks() -> str:
    """Seconds of whole attacks beside those of other libraries."""
    rows = []
    for report in results("attacks"):
        network, turns = report["weights"].partition(".")[0], report["attacks"]
        for name, row in turns.items():
            library, attack = name.split(" ")
            if library != "tljax":
                ours, theirs = turns[f"tljax {attack}"]["seconds"], row["seconds"]
                what = [network, f"{attack.upper()}, {report['steps']} steps", batch(report)]
                times = [f"{ours:.1f}", f"{theirs:.1f}", ratio(theirs / ours)]
                rows.append([*what, library, *times])
    header = ["network", "attack", "batch", "beside", "tljax, s", "theirs, s", "times as fast"]
    return table(header, rows)


def main() -> None:
    """Prints the tables, with what they were measured on."""
    environment = next(iter(results("speed")))["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("jax", "torch"))
    print(f"Measured on {environment['devices']}, {versions}.\n")
    print(f"{speed()}\n\n{attacks()}")


if __name__ == "__main__":
    main()
