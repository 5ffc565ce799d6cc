"""The results of the last runs as Markdown, for README.md beside this file.

python benchmarks/tables.py
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tljax.metrics.classification import standard_error

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


def network(report: dict[str, Any]) -> str:
    """The beginning of the weights' name."""
    return report["weights"].partition(".")[0]


def ratio(value: float) -> str:
    """What one looks for."""
    return f"**{value:.2f}**"


OURS = {"tljax": "", "tljax cached": " cached"}
"""Ours of speed.py, and what the table adds to the question."""


def speed() -> str:
    """Seconds of a batch, and how many times as long others take."""
    peers = ("torch", "torch.compile", "onnxruntime", "keras", "flax")
    rows = []
    for report in results("speed"):
        for question, turns in report["questions"].items():
            for name, suffix in OURS.items():
                if name in turns:
                    ours = turns[name]["seconds"]
                    theirs = [turns[peer]["seconds"] if peer in turns else None for peer in peers]
                    jax = report["environment"]["jax"]
                    what = [report["model"], question + suffix, batch(report), report["dtype"], jax]
                    times = (seconds and ratio(seconds / ours) for seconds in theirs)
                    cells = f"{ours:.2f}", share_of_peak(report, question, ours)
                    rows.append([*what, *cells, *(cell or "" for cell in times)])
    known = "network", "question", "batch", "computes in", "jax"
    return table([*known, "tljax, s", "of the peak", *peers], rows)


PASSES = {"forward": 1, "input-gradient": 2, "step": 3, "step-batch-norm": 3}
"""What a question takes, in forward passes: each gradient is as much work again."""


def share_of_peak(report: dict[str, Any], question: str, seconds: float) -> str:
    """The work as it is usually counted, a second, over what one large product reaches."""
    peak = report.get("gflop_per_second_of_a_large_product")
    if peak is None or question not in PASSES:
        return ""
    return f"{PASSES[question] * report['gflop_of_a_forward_pass'] / seconds / peak:.0%}"


def attacks() -> str:
    """Seconds of whole attacks beside those of other libraries."""
    rows = []
    for report in results("attacks"):
        turns = report["attacks"]
        for name, row in turns.items():
            library, attack = name.split(" ")
            if library != "tljax":
                ours, theirs = turns[f"tljax {attack}"]["seconds"], row["seconds"]
                what = [
                    network(report),
                    f"{attack.upper()}, {report['steps']} steps",
                    batch(report),
                ]
                times = [f"{ours:.1f}", f"{theirs:.1f}", ratio(theirs / ours)]
                rows.append([*what, library, *times])
    header = ["network", "attack", "batch", "beside", "tljax, s", "theirs, s", "times as fast"]
    return table(header, rows)


def robustness() -> str:
    """Accuracy under attack, with its standard error; of one network there may be several runs."""
    shares: dict[tuple[str, str, int, str], dict[float, float]] = {}
    for report in results("robustness"):
        for attack, row in report["robust"].items():
            what = network(report), report["data"], report["examples"], attack
            known = shares.setdefault(what, {})
            known |= {0.0: report["clean"]} | {float(key): share for key, share in row.items()}
    epsilons = sorted({epsilon for row in shares.values() for epsilon in row})
    rows = [
        [name, f"{count} of {data}", attack, *(percent(row.get(e), count) for e in epsilons)]
        for (name, data, count, attack), row in shares.items()
    ]
    return table(["network", "images", "attack", *(f"{e:g}" for e in epsilons)], rows)


def percent(share: float | None, count: int) -> str:
    """With its standard error; nothing where nothing was measured."""
    if share is None:
        return ""
    error = standard_error(share, count)
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def jobs() -> str:
    """Whole jobs beside the loops of courses."""
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
    """Images a second from files to batches."""
    rows = []
    for report in results("input"):
        for way, row in report["ways"].items():
            side = 256 * report["enlarge"]
            cells = [row[f"images_per_second{suffix}"] for suffix in ("", "_and_core")]
            rows.append([f"{side} px", way, *(f"{cell:.0f}" for cell in cells)])
    return table(["short side", "way", "images/s", "a core"], rows)


def parity() -> str:
    """The largest difference from the reference, over the scale of its stage; folded away."""
    known = json.loads((RESULTS / "parity.json").read_text("utf-8"))["pairs"]
    networks: dict[str, list[dict[str, Any]]] = {}
    for pair in known:
        networks.setdefault(pair["model"], []).append(pair)
    rows = [
        [
            name,
            ", ".join(pair["layout"] for pair in pairs),
            ", ".join(sorted({f"{h} x {w}" for pair in pairs for h, w in pair["sizes"]})),
            f"{max(pair['largest'] for pair in pairs):.1e}",
        ]
        for name, pairs in networks.items()
    ]
    worst = max(pair["largest"] for pair in known)
    summary = f"{len(known)} pairs of network and format, {worst:.1e} at most"
    body = table(["network", "formats", "images", "difference"], rows)
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def starts() -> str:
    """Seconds since the start of the process, and its memory."""
    rows = []
    for report in results("startup"):
        for side, marks in report["sides"].items():
            cells = [f"{mark['seconds']:.1f}" for mark in marks.values()]
            peak = max(mark["peak_gib"] for mark in marks.values())
            rows.append([network(report), batch(report), side, *cells, f"{peak:.1f}"])
    marks = ["imported", "loaded", "first forward", "first step", "second step"]
    return table(["network", "batch", "", *(f"{mark}, s" for mark in marks), "peak, GiB"], rows)


def devices() -> str:
    """Seconds of a step over several devices."""
    rows = []
    for report in results("devices"):
        found = report["devices"]
        for count in (name.split()[1] for name in found if name.startswith("tljax")):
            ours, theirs = (found[f"{side} {count}"]["seconds"] for side in ("tljax", "pmap"))
            times = [f"{ours:.2f}", f"{theirs:.2f}", ratio(theirs / ours)]
            rows.append([network(report), batch(report), count, *times])
    return table(["network", "batch", "devices", "tljax, s", "pmap, s", "times as fast"], rows)


def accelerators() -> str:
    """Milliseconds of each program on one chip; what others take is a multiple of the first."""
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
                    what = title if name == "tljax" else f"{title}: {name}"
                    figures = f"{1e3 * row['seconds']:.2f}", f"{row['examples_per_second']:.0f}"
                    cells = [ratio(time) if time and first else "" for time in times]
                    rows.append([record["device"], what, *figures, *cells])
    header = ["device", "program, images at once", "tljax, ms", "images/s", *peers]
    return table(header, rows)


MAKERS = (speed, accelerators, attacks, jobs, starts, devices, inputs, robustness, parity)


def main() -> None:
    """Prints the tables, with what they were measured on."""
    environment = next(iter(results("speed")))["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("jax", "torch"))
    print(f"Measured on {environment['devices']}, {versions}.\n")
    made = [make() for make in MAKERS]
    print("\n\n".join(text for text in made if text.count("\n") > 1))


if __name__ == "__main__":
    main()
