"""Describe in text what compiling a program says about running it."""

import os
from typing import Any

from tljax.runtime.machines import Machine

_GIB, _MIB = 2**30, 2**20
_SHORT = 1e-4  # seconds


def rehearsal_lines(record: dict[str, Any], machine: Machine) -> list[str]:
    """Return the lines of one program.

    Args:
        record: `tljax.studies.rehearse.Rehearsal.as_json`, or only ``name`` and ``error``.
        machine: the machine that it was compiled for.
    """
    size, chips = record.get("batch"), machine.chips
    share = f", {size // chips:,} a chip" if size and size % chips == 0 else ""
    batch = f"  ({size:,} examples{share})" if size else ""
    rows = [("fits", _fit(record, machine))]
    if record.get("note"):
        rows.append(("note", record["note"]))
    if record.get("memory"):
        rows += [
            ("memory a chip", _memory(record["memory"])),
            ("between chips", _collectives(record["collectives"])),
            ("speed", _speed(record, machine)),
            *([("loader", _loader(record, machine))] if record["loading"] else []),
            ("compiled in", f"{record['compile_seconds'] / 60:.1f} min"),
        ]
    return [f"{record['name']}{batch}", *(f"  {name:14} {text}" for name, text in rows)]


def _fit(record: dict[str, Any], machine: Machine) -> str:
    limit = machine.usable_memory / _GIB
    largest = record.get("largest_batch")
    words = []
    if record["error"]:
        words = [f"no: {record['error']}"]
    else:
        total = record["memory"]["total"] / _GIB
        words = [f"{'yes' if record['fits'] else 'no'}: {total:.2f} of {limit:.2f} GiB a chip"]
    if largest:
        words.append(f"{largest:,} examples do, {largest // machine.chips:,} a chip")
    elif largest == 0:
        words.append("no batch was found that does")
    return "; ".join(words)


def _memory(memory: dict[str, int]) -> str:
    kinds = ("arguments", "outputs", "temporaries", "code")
    return ", ".join(f"{kind} {memory[kind] / _MIB:,.0f} MiB" for kind in kinds)


def _collectives(collectives: dict[str, Any]) -> str:
    if not collectives:
        return "nothing"

    def describe(kind: str, found: dict[str, Any]) -> str:
        shares = sorted(found["dtypes"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{size / _MIB:,.1f} {dtype}" for dtype, size in shares if size >= 1e4)
        plural = "s" if found["times"] > 1 else ""
        size = f"{found['bytes'] / _MIB:,.1f} MiB"
        return f"{found['times']} {kind}{plural} of {size}" + (f" ({parts})" if parts else "")

    return "; ".join(describe(kind, found) for kind, found in collectives.items())


def _speed(record: dict[str, Any], machine: Machine) -> str:
    seconds = record["seconds"]
    if seconds is None:
        return "not estimated at low effort"
    if seconds < _SHORT:
        return f"less than {1e3 * _SHORT:g} ms, in which a program hardly starts"
    milliseconds, rate = 1e3 * seconds, record["examples_per_second"]
    figures = f"{milliseconds:,.1f} ms, {rate:,.0f} examples/s"
    if machine.chip.kind == "tpu":
        clock = machine.chip.clock / 1e9
        return f"{figures} ({record['cycles'] / 1e6:,.1f} M cycles at {clock:g} GHz, estimated)"
    return f"at best {figures} (roofline, bound by {record['bound']}: a limit, no estimate)"


def _loader(record: dict[str, Any], machine: Machine) -> str:
    here = f"this computer delivers {record['loading']:,.0f}"
    if record["seconds"] is None or record["seconds"] < _SHORT:
        return f"{here} images/s on {os.cpu_count()} cores"
    rate = record["examples_per_second"] / machine.hosts
    return f"must deliver {rate:,.0f} images/s on each host; {here} on {os.cpu_count()} cores"
