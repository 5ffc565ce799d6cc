"""Print the committed results as Markdown tables, for README.md in this folder.

python benchmarks/tables.py
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tljax.metrics.classification import standard_error

RESULTS = Path(__file__).parent / "results"


def results(kind: str) -> Iterable[dict[str, Any]]:
    """Read the reports of one benchmark, sorted by file name."""
    for path in sorted(RESULTS.glob(f"{kind}-*.json")):
        yield json.loads(path.read_text("utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def batch(report: dict[str, Any]) -> str:
    """Format the batch size and the side of the images."""
    return f"{report['batch_size']} x {report['image_size']} px"


def network(report: dict[str, Any]) -> str:
    """Return the name of the network, which begins the name of its weights."""
    return report["weights"].partition(".")[0]


def ratio(value: float) -> str:
    """Format the ratio of two durations."""
    return f"**{value:.2f}**"


OURS = {"tljax": "", "tljax cached": " cached"}
"""The rows of tljax in the reports of speed.py, and what the table appends to the question."""


def speed() -> str:
    """Tabulate seconds per batch, and how many times as long other libraries take."""
    peers = ("torch", "torch.compile", "onnxruntime", "keras", "flax")
    rows = []
    for report in results("speed"):
        for question, turns in report["questions"].items():
            for name, suffix in OURS.items():
                if name in turns:
                    ours = turns[name]["seconds"]
                    others = [turns[peer]["seconds"] if peer in turns else None for peer in peers]
                    jax = report["environment"]["jax"]
                    work = [report["model"], question + suffix, batch(report), report["dtype"], jax]
                    times = (seconds and ratio(seconds / ours) for seconds in others)
                    cells = f"{ours:.2f}", share_of_peak(report, question, ours)
                    rows.append([*work, *cells, *(cell or "" for cell in times)])
    header = "network", "question", "batch", "dtype", "jax"
    return table([*header, "tljax, s", "of the peak", *peers], rows)


PASSES = {"forward": 1, "input-gradient": 2, "step": 3, "step-batch-norm": 3}
"""The work of each question in forward passes; a gradient counts as one more pass each."""


def share_of_peak(report: dict[str, Any], question: str, seconds: float) -> str:
    """Format the FLOP rate as a share of the rate of a large matrix product."""
    peak = report.get("gflop_per_second_of_a_large_product")
    if peak is None or question not in PASSES:
        return ""
    return f"{PASSES[question] * report['gflop_of_a_forward_pass'] / seconds / peak:.0%}"


def attacks() -> str:
    """Tabulate the seconds of attacks, compared with other libraries."""
    rows = []
    for report in results("attacks"):
        turns = report["attacks"]
        for name, row in turns.items():
            library, attack = name.split(" ")
            if library != "tljax":
                ours, other = turns[f"tljax {attack}"]["seconds"], row["seconds"]
                title = f"{attack.upper()}, {report['steps']} steps"
                times = [f"{ours:.1f}", f"{other:.1f}", ratio(other / ours)]
                rows.append([network(report), title, batch(report), library, *times])
    header = ["network", "attack", "batch", "library", "tljax, s", "library, s", "times as fast"]
    return table(header, rows)


def robustness() -> str:
    """Tabulate the accuracy under attack in percent; reports of the same network are merged."""
    shares: dict[tuple[str, str, int, str], dict[float, float]] = {}
    for report in results("robustness"):
        for attack, row in report["robust"].items():
            key = network(report), report["data"], report["examples"], attack
            accuracies = {float(epsilon): share for epsilon, share in row.items()}
            shares.setdefault(key, {}).update({0.0: report["clean"]} | accuracies)
    epsilons = sorted({epsilon for row in shares.values() for epsilon in row})
    rows = [
        [name, f"{count} of {data}", attack, *(percent(row.get(e), count) for e in epsilons)]
        for (name, data, count, attack), row in shares.items()
    ]
    return table(["network", "images", "attack", *(f"{e:g}" for e in epsilons)], rows)


def percent(share: float | None, count: int) -> str:
    """Format a share in percent with its standard error; empty if it was not measured."""
    if share is None:
        return ""
    error = standard_error(share, count)
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def jobs() -> str:
    """Tabulate the seconds from a folder to a classifier."""
    rows = []
    for report in results("job"):
        for side, row in report["sides"].items():
            top1 = "" if row["val_top1"] is None else f"{row['val_top1']:.3f}"
            times = ratio(row["tljax_is_times_as_fast"]) if side != "tljax" else ""
            rows.append(
                [network(report), report["data"], side, f"{row['seconds']:.0f}", top1, times]
            )
    return table(["network", "data", "", "seconds", "top-1", "tljax is times as fast"], rows)


def inputs() -> str:
    """Tabulate the images per second from files to batches."""
    rows = []
    for report in results("input"):
        for reader, row in report["ways"].items():
            side = 256 * report["enlarge"]
            rows.append([f"{side} px", reader, f"{row['images_per_second']:,.0f}"])
    return table(["short side", "reader", "images/s"], rows)


def parity() -> str:
    """Tabulate the largest difference from the reference, relative to the scale of its stage."""
    pairs = json.loads((RESULTS / "parity.json").read_text("utf-8"))["pairs"]
    networks: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        networks.setdefault(pair["model"], []).append(pair)
    rows = [
        [
            name,
            ", ".join(pair["layout"] for pair in group),
            ", ".join(sorted({f"{h} x {w}" for pair in group for h, w in pair["sizes"]})),
            f"{max(pair['largest'] for pair in group):.1e}",
        ]
        for name, group in networks.items()
    ]
    worst = max(pair["largest"] for pair in pairs)
    summary = f"{len(pairs)} pairs of network and format, {worst:.1e} at most"
    body = table(["network", "formats", "images", "difference"], rows)
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def starts() -> str:
    """Tabulate the seconds since the start of the process, and its peak memory."""
    rows = []
    for report in results("startup"):
        for side, marks in report["sides"].items():
            cells = [f"{mark['seconds']:.1f}" for mark in marks.values()]
            peak = max(mark["peak_gib"] for mark in marks.values())
            rows.append([network(report), batch(report), side, *cells, f"{peak:.1f}"])
    marks = ["imported", "loaded", "first forward", "first step", "second step"]
    return table(["network", "batch", "", *(f"{mark}, s" for mark in marks), "peak, GiB"], rows)


def devices() -> str:
    """Tabulate the seconds of a step over several devices."""
    rows = []
    for report in results("devices"):
        turns = report["devices"]
        for count in (name.split()[1] for name in turns if name.startswith("tljax")):
            ours, pmap = (turns[f"{side} {count}"]["seconds"] for side in ("tljax", "pmap"))
            times = [f"{ours:.2f}", f"{pmap:.2f}", ratio(pmap / ours)]
            rows.append([network(report), batch(report), count, *times])
    return table(["network", "batch", "devices", "tljax, s", "pmap, s", "times as fast"], rows)


def accelerators() -> str:
    """Tabulate milliseconds per program on one chip, and how many times as long torch takes."""
    peers = ("torch", "torch.compile")
    rows = []
    for report in results("accelerator"):
        for part, record in report["parts"].items():
            turns = {} if part in ("device", "input") else record.get("turns", {})
            for title, sides in turns.items():
                for name, row in sides.items():
                    if "seconds" not in row or name in peers:
                        continue
                    first = name in ("tljax", next(iter(sides)))
                    times = [sides.get(peer, {}).get("takes_times_as_long") for peer in peers]
                    program = title if name == "tljax" else f"{title}: {name}"
                    figures = f"{1e3 * row['seconds']:.2f}", f"{row['examples_per_second']:.0f}"
                    cells = [ratio(time) if time and first else "" for time in times]
                    rows.append([record["device"], program, *figures, *cells])
    header = ["device", "program, batch size", "tljax, ms", "images/s", *peers]
    return table(header, rows)


def compiled() -> str:
    """Tabulate what the TPU compiler estimates of programs, beside those in plain Flax."""
    rows = []
    for report in results("compiled"):
        for title, sides in report["programs"].items():
            row = sides["tljax"]
            if "cycles" not in row:
                continue
            moved = [
                f"{found['times']} {kind} of {found['bytes'] / 2**20:.1f} MiB"
                for kind, found in row["collectives"].items()
            ]
            flax = sides.get("flax", {}).get("cycles")
            cells = f"{row['cycles'] / 1e6:.1f}", flax and f"{flax / 1e6:.1f}"
            figures = f"{row['milliseconds']:.1f}", f"{row['images_per_second']:,}"
            last = f"{row['memory']['temporaries'] / 2**30:.2f}", ", ".join(moved)
            rows.append([report["machine"], title, *(x or "" for x in cells), *figures, *last])
    header = ["chip", "program", "M cycles", "Flax, M cycles", "ms", "images/s", "temporaries, GiB"]
    return table([*header, "between chips"], rows)


def memory() -> str:
    """Tabulate the memory of a device during a training step, as XLA computes it."""
    rows = []
    for report in results("memory"):
        for name, step in report["steps"].items():
            work = report["model"], batch(report), report["dtype"], name
            rows.append([*work, *(f"{value / 1024:.2f}" for value in step.values())])
    header = "network", "images per device", "dtype", "devices", "state, GiB"
    return table([*header, "activations and gradients, GiB", "peak, GiB"], rows)


TABLES = (
    *(speed, accelerators, compiled, attacks, jobs, starts, devices, memory, inputs, robustness),
    parity,
)


def main() -> None:
    """Print all tables, with the device and the versions they were measured with."""
    environment = next(iter(results("speed")))["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("jax", "torch"))
    print(f"Measured on {environment['devices']}, {versions}.\n")
    texts = [make_table() for make_table in TABLES]
    print("\n\n".join(text for text in texts if text.count("\n") > 1))


if __name__ == "__main__":
    main()
