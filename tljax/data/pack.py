"""Write packed photographs: in parallel, to be resumed, the same bytes for any number of workers.

Shards are written one by one, each under a temporary name, and with what is known of its
photographs in a file of the folder ``unfinished``. The header is written last.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import PIL

from tljax.data.byte_strings import ByteStrings
from tljax.data.examples import Source, Splits
from tljax.data.files import printable
from tljax.data.packed import (
    HEADER,
    INDEX,
    Encoding,
    Header,
    Interpolation,
    Job,
    Record,
    Shard,
    open_packed,
    read_header,
)
from tljax.data.pictures import print_remarks
from tljax.data.workers import cores, start_processes
from tljax.runtime.errors import RequestError, WriteError
from tljax.runtime.files import MARKER, atomic_write, locked, mark_output, sha256, to_json
from tljax.runtime.progress import track

_UNFINISHED = "unfinished"
_PLAN = "plan.json"
_TEMPORARY = re.compile(  # what `atomic_write` calls the files that this module writes
    r"\.(\.tljax|part-\d+\.(bin|npz)|index\.npz|(header|plan)\.json)\.[0-9a-f]+\.part"
)
_SHARD_BYTES = 2**30
_CHUNK = 16  # examples that a worker packs at once


def pack(
    splits: Splits,
    out: Path,
    *,
    source: str = "",
    size: int = 256,
    interpolation: Interpolation = "bilinear",
    encoding: Encoding = "raw",
    workers: int = 0,
    wait: bool = False,
) -> Header:
    """Write the photographs of a data set as packed photographs; see docs/packed.md.

    A call that was interrupted is resumed by the same call: shards that are complete are kept.
    Photographs that cannot be read are recorded with the reason. If the folder is complete already,
    nothing is written.

    Args:
        splits: the training and validation parts. Targets of a source must be its labels.
        out: the folder to write: one that does not exist, is empty, or was written by this
            function from the same images with the same settings.
        source: the name of the data set, for the header.
        size: short side of the packed photographs, in pixels; 4 or more.
        interpolation: the Pillow filter to resize with.
        encoding: ``raw`` pixels, or ``jpeg`` files of quality 95.
        workers: number of processes that decode; 0 decodes in threads, one for each core.
        wait: wait for another process that packs into the folder.

    Returns:
        The header of the folder.

    Raises:
        RequestError: the folder holds something else, another process packs into it, it cannot be
            written, or no photograph can be read.
    """
    if size < 4:
        raise RequestError(f"size {size}: choose 4 or more")
    parts = [splits.train] if splits.val is splits.train else [splits.train, splits.val]
    if any(part.targets is not None for part in parts):
        raise RequestError("a source with targets cannot be packed: give them as labels")
    plan = {
        "size": size,
        "interpolation": interpolation,
        "encoding": encoding,
        "images": [part.digest for part in parts],
        "pillow": PIL.__version__,
    }
    with _claimed(out, plan, wait=wait) as complete:
        if (header := complete) is None:
            job = Job(tuple(part.examples for part in parts), size, interpolation, encoding)
            names = [name for part in parts for name in part.names]
            shards = _write_shards(out, job, names, workers)
            header = _finish(out, plan, splits, parts, shards, source)
        _remove_unfinished(out)
        return header


# --- the folder -----------------------------------------------------------------------------------


@contextmanager
def _claimed(out: Path, plan: dict[str, Any], *, wait: bool) -> Iterator[Header | None]:
    """Lock a folder to write to, and check that it holds nothing else; create it if needed.

    Yields:
        The header if the folder is complete already.
    """
    _refuse_other_files(out)
    mark_output(out)
    message = f"another process packs into {out}: wait for it or choose another"
    with locked(out / MARKER, message, wait=wait):
        if (out / HEADER).exists():
            header = _read_complete(out)
            found = {**plan, **asdict(header), "images": header.source.get("images")}
            _compare(out, found, plan)  # another version of Pillow is no reason to pack again
            yield header
            return
        path = out / _UNFINISHED / _PLAN
        if any(path.parent.glob("part-*.npz")):
            _compare(out, _read_json(path), plan)
        else:  # no shard is complete, so that nothing is lost
            _write_json(path, plan)
        _remove_temporary(out)
        yield None


def _refuse_other_files(out: Path) -> None:
    """Refuse a folder that holds anything that `pack` did not write.

    Raises:
        RequestError: it does, or it is no folder.
    """
    try:
        names = {entry.name for entry in os.scandir(out)}
    except FileNotFoundError:
        return
    except OSError as error:
        raise RequestError(f"{out} cannot be read as a folder: {error.strerror}") from error
    if HEADER in names:
        read_header(out)
        return
    if (out / _UNFINISHED / _PLAN).exists():
        return
    others = names - {MARKER, _UNFINISHED}
    if others := sorted(name for name in others if not _TEMPORARY.fullmatch(name)):
        raise RequestError(
            f"{out} holds something else, {printable(others[0])}: choose an empty folder"
        )


def _read_complete(out: Path) -> Header:
    """Return the header of a folder that is complete.

    Raises:
        RequestError: it was damaged since.
    """
    try:
        return open_packed(out)[0].header
    except RequestError as error:
        raise RequestError(
            f"{out} was damaged after it was packed: remove it to pack again ({error})"
        ) from error


def _compare(out: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    """Check that a folder was packed, or was begun, with these settings.

    Raises:
        RequestError: a setting differs.
    """
    for name, value in plan.items():
        if found.get(name) != value:
            differs = "other images" if name == "images" else f"{name} {found.get(name)}"
            wanted = "" if name == "images" else f", not {value}"
            raise RequestError(f"{out} was packed with {differs}{wanted}: choose another folder")


def _remove_temporary(out: Path) -> None:
    """Remove the files that a killed process left."""
    for path in [*out.iterdir(), *(out / _UNFINISHED).glob("*"), *(out / _UNFINISHED).glob(".*")]:
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def _remove_unfinished(out: Path) -> None:
    """Remove what only an unfinished folder needs."""
    folder = out / _UNFINISHED
    for path in [folder / _PLAN, *folder.glob("part-*.npz")]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it does not exist, or somebody else's file is in it
        folder.rmdir()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is damaged ({error!s:.100}): choose another folder") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(value, indent=1) + "\n", "utf-8")


# --- shards ---------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What is known of a shard: its file, arrays of its examples, and why some are unreadable."""

    shard: Shard
    arrays: dict[str, np.ndarray]
    reasons: dict[int, str]


def _write_shards(out: Path, job: Job, names: Sequence[str], workers: int) -> list[_Part]:
    """Write the shards that are missing or damaged, and return what is known of all of them."""
    per_shard = max(1, _SHARD_BYTES // (6 * job.size**2))  # none is longer than twice its height
    shards = [range(len(names))[i : i + per_shard] for i in range(0, len(names), per_shard)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(_read_part, out), range(len(shards)), shards))
    missing = [number for number, part in enumerate(found) if part is None]
    if kept := len(shards) - len(missing):
        print(f"note: {kept} of {len(shards)} shards are complete", file=sys.stderr)
    if not missing:
        return [part for part in found if part is not None]
    chunks = {
        number: [shards[number][i : i + _CHUNK] for i in range(0, len(shards[number]), _CHUNK)]
        for number in missing
    }
    total = sum(len(shards[number]) for number in missing)
    _require_space(out, job, total)
    pool, work, ahead = _start(job, workers)
    everything = (chunk for number in missing for chunk in chunks[number])
    with pool, closing(_in_order(pool, work, everything, ahead)) as records:
        packed = track(records, description="pack", total=total, size=len)
        for number in missing:
            some = islice(packed, len(chunks[number]))
            rows = (record for chunk in some for record in chunk)
            found[number] = _write_part(out, number, names, shards[number], rows)
        next(packed, None)  # prints the line of the whole loop
    return [part for part in found if part is not None]


def _require_space(out: Path, job: Job, photographs: int) -> None:
    """Check that a disk holds raw photographs, if all of them are square.

    Raises:
        RequestError: it has less free space.
    """
    needed, free = 3 * job.size**2 * photographs, shutil.disk_usage(out).free
    if job.encoding == "raw" and needed > free:
        raise RequestError(
            f"{out}: the images take {needed / 1e9:.1f} GB or more, and {free / 1e9:.1f} GB are "
            "free: choose another disk, a smaller size or jpeg"
        )


def _start(job: Job, workers: int) -> tuple[Executor, Callable[[range], list[Record]], int]:
    """Start threads or processes; return the function that they run, and how many calls to queue.

    The job is sent to each process once.
    """
    if not workers:
        threads = cores()
        return ThreadPoolExecutor(threads), job, 4 * threads
    return start_processes(workers, _keep, job), _work, 4 * workers


_kept: list[Job] = []  # of a process that packs


def _keep(job: Job) -> None:
    _kept[:] = [job]


def _work(indices: range) -> list[Record]:
    return _kept[0](indices)


def _in_order(
    pool: Executor,
    work: Callable[[range], list[Record]],
    chunks: Iterable[range],
    ahead: int,
) -> Generator[list[Record]]:
    """Yield the results of the chunks in their order, with a bounded number of them in memory."""
    pending = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _write_part(
    out: Path, number: int, names: Sequence[str], examples: range, records: Iterator[Record]
) -> _Part:
    """Write a shard, then what is known of it."""
    name, offset, digest = f"part-{number:05d}.bin", 0, hashlib.sha256()
    rows, hashes, reasons = list[tuple[int, ...]](), list[bytes](), dict[int, str]()
    with _resumable(), atomic_write(out / name) as temporary, temporary.open("wb") as file:
        for index, record in zip(examples, records, strict=True):
            file.write(record.data)
            digest.update(record.data)
            shard = number if record.reason is None else -1
            rows.append((shard, offset, len(record.data), *record.place))
            hashes.append(record.digest)
            offset += len(record.data)
            if record.reason is not None:
                reasons[index] = record.reason
            print_remarks(names[index], *record.remarks)
    columns = np.array(rows, np.int64).T
    arrays = {
        name: x.astype(kind) for (name, kind), x in zip(_COLUMNS.items(), columns, strict=True)
    }
    arrays["hash"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)
    part = _Part(Shard(name, offset, digest.hexdigest()), arrays, reasons)
    known = np.array(json.dumps([part.shard, [*reasons.items()]]))
    with _resumable():
        _save(_path_of_part(out, number), {**arrays, "known": known})
    return part


_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "height": np.int32,
    "width": np.int32,
    "transposed": np.bool_,
    "original_height": np.int32,
    "original_width": np.int32,
}


def _read_part(out: Path, number: int, examples: range) -> _Part | None:
    """Return what is known of a shard; None if it is not complete."""
    try:
        with np.load(_path_of_part(out, number), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        shard, reasons = json.loads(str(arrays.pop("known")))
        part = _Part(Shard(*shard), arrays, {int(i): str(reason) for i, reason in reasons})
        complete = arrays.keys() == {*_COLUMNS, "hash"}
        complete &= all(len(array) == len(examples) for array in arrays.values())
        return part if complete and sha256(out / part.shard.name) == part.shard.sha256 else None
    except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile):
        return None  # it is written again


def _path_of_part(out: Path, number: int) -> Path:
    return out / _UNFINISHED / f"part-{number:05d}.npz"


def _save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Write an ``.npz`` file atomically; return its SHA-256."""
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] - arrays, no option
        return sha256(temporary)


@contextmanager
def _resumable() -> Iterator[None]:
    """Add to the error of a disk what to do."""
    try:
        yield
    except WriteError as error:
        raise WriteError(
            f"{error}: free some space and repeat the command, which resumes"
        ) from error


# --- the index and the header ---------------------------------------------------------------------


def _finish(
    out: Path,
    plan: dict[str, Any],
    splits: Splits,
    parts: Sequence[Source],
    shards: Sequence[_Part],
    source: str,
) -> Header:
    """Write the index and then the header."""
    arrays = {
        name: np.concatenate([part.arrays[name] for part in shards]) for name in (*_COLUMNS, "hash")
    }
    train, reasons = splits.train, {i: why for part in shards for i, why in part.reasons.items()}
    if len(reasons) == len(arrays["shard"]):
        raise RequestError(f"no image can be read; {train.names[0]}: {reasons[0]}")
    with _resumable():
        index = _save(out / INDEX, {**arrays, **_label_arrays(parts)})
    header = Header(
        size=plan["size"],
        interpolation=plan["interpolation"],
        encoding=plan["encoding"],
        examples=len(arrays["shard"]),
        classes=train.classes,
        task=asdict(train.task),
        notes=splits.notes,
        shards=tuple(part.shard for part in shards),
        index=index,
        unreadable=reasons,
        source={"name": source, "images": plan["images"]},
        versions={"tljax": version("tljax"), "pillow": plan["pillow"]},
    )
    with _resumable():
        _write_json(out / HEADER, header.to_json())
    return header


def _label_arrays(parts: Sequence[Source]) -> dict[str, np.ndarray]:
    """Return the arrays of labels, groups, names and parts, of one part after the other."""
    names = ByteStrings.of(
        name.encode("utf-8", "backslashreplace") for part in parts for name in part.names
    )
    arrays = {
        "part": np.repeat(np.arange(len(parts), dtype=np.uint8), [len(part) for part in parts]),
        "name_bytes": names.data,
        "name_ends": names.ends,
        "labels": np.concatenate([part.labels for part in parts]),
    }
    for name in parts[0].extra:
        arrays[f"extra/{name}"] = np.concatenate([part.extra[name] for part in parts])
    groups = [part.groups for part in parts if part.groups is not None]
    if groups:
        arrays["groups"] = np.concatenate(groups)
    return arrays
