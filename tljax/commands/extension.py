"""Load an extension: a Python file that hands functions of one's own to training and loading."""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, TypedDict

from tljax.runtime.errors import RequestError
from tljax.runtime.files import sha256


class Extension(TypedDict, total=False):
    """What an extension may hold; all but ``modules`` are keyword arguments of `tljax.fit`.

    Attributes:
        objective: the loss and the metrics of a batch.
        materialize: makes the network's parameters of those that train and those that do not.
        transform: an Optax transformation, or a function of one.
        on_step: is called with a number of steps and the means of the last ones.
        on_epoch: is called with the whole history whenever it has grown.
        new_head: a network with a new head.
        modules: Flax module classes by name, for `load_pretrained`.
    """

    objective: Callable[..., Any]
    materialize: Callable[..., Any]
    transform: Any
    on_step: Callable[..., None]
    on_epoch: Callable[..., None]
    new_head: Callable[..., Any]
    modules: Mapping[str, Any]


def split_name(spec: str) -> tuple[str, str]:
    """Split ``FILE.py:NAME``; without a NAME it is ``extension``."""
    file, _, name = spec.rpartition(":")
    return (file, name) if file and name.isidentifier() else (spec, "extension")


def load_extension(spec: str) -> tuple[Extension, str]:
    """Run the file that ``FILE.py[:NAME]`` names, once, and return what it calls NAME.

    Returns:
        The extension, and the SHA-256 of the file.

    Raises:
        RequestError: there is no such file, it fails, or NAME is missing or no extension.
    """
    from tljax.data.folders import as_path, suggestion

    file, name = split_name(spec)
    path = as_path(file)
    try:
        code = path.read_bytes()
    except FileNotFoundError as error:
        raise RequestError(f"--extension: {file} does not exist{suggestion(path)}") from error
    except OSError as error:
        raise RequestError(f"--extension: {file} cannot be read: {error.strerror}") from error
    digest = sha256(code)
    module = _run(path.resolve(), code, digest)
    found = getattr(module, name, None)
    if not isinstance(found, Mapping):
        what = f"'{name}' is no dict" if hasattr(module, name) else f"it has no '{name}'"
        raise RequestError(f"{file}: {what}: define one, or name another by FILE.py:NAME")
    known = Extension.__annotations__
    for key, value in found.items():
        if key not in known:
            meant = get_close_matches(str(key), known, n=1)
            said = f"did you mean {meant[0]}?" if meant else f"choose from {', '.join(known)}"
            raise RequestError(f"{file}: {name} has an unknown key '{key}'; {said}")
        if key == "modules" and not isinstance(value, Mapping):
            raise RequestError(f"{file}: 'modules' of {name} is no dict")
        if key not in ("modules", "transform") and not callable(value):
            raise RequestError(f"{file}: '{key}' of {name} is no function")
    return Extension(**found), digest


@lru_cache
def _run(path: Path, code: bytes, digest: str) -> ModuleType:
    """Run a file as a module; what runs is what was hashed, and nothing is written beside it."""
    module = ModuleType(f"tljax_extension_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for themselves
    try:
        exec(compile(code, path, "exec"), module.__dict__)  # noqa: S102 - what --extension is for
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        own = [at for at in extract_tb(error.__traceback__) if at.filename == str(path)]
        line = own[-1].lineno if own else getattr(error, "lineno", None)
        raise RequestError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module
