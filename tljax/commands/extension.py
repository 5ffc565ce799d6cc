"""Extensions: Python files of the user with functions for training and modules for loading."""

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
    """Contents of an extension; all but ``modules`` are keyword arguments of `tljax.fit`.

    Attributes:
        objective: a function that computes the loss and the metrics of a batch.
        materialize: a function from trainable and frozen parameters to those of the network.
        transform: an Optax transformation, or a function that wraps the one of the optimizer.
        on_step: a function that is called with the step number and metrics averaged since the last
            call.
        on_epoch: a function that is called with the history after every epoch.
        new_head: a function that gives a network a new head.
        modules: Flax module classes by name, for `tljax.load_pretrained`.
    """

    objective: Callable[..., Any]
    materialize: Callable[..., Any]
    transform: Any
    on_step: Callable[..., None]
    on_epoch: Callable[..., None]
    new_head: Callable[..., Any]
    modules: Mapping[str, Any]


def split_name(spec: str) -> tuple[str, str]:
    """Split ``FILE.py[:NAME]`` into the file and the name, by default ``extension``."""
    file, _, name = spec.rpartition(":")
    return (file, name) if file and name.isidentifier() else (spec, "extension")


def load_extension(spec: str) -> tuple[Extension, str]:
    """Run a Python file, once in a process, and return the extension that it defines.

    Args:
        spec: ``FILE.py[:NAME]``, where NAME is a dict, by default ``extension``.

    Returns:
        The extension, and the SHA-256 of the file in hexadecimal.

    Raises:
        RequestError: the file is missing or raises an error, or NAME is missing or no extension.
    """
    from tljax.data.folders import expand_path, suggest_path

    file, name = split_name(spec)
    path = expand_path(file)
    try:
        code = path.read_bytes()
    except FileNotFoundError as error:
        raise RequestError(f"--extension: {file} does not exist{suggest_path(path)}") from error
    except OSError as error:
        raise RequestError(f"--extension: {file} cannot be read: {error.strerror}") from error
    digest = sha256(code)
    module = _run(path.resolve(), code, digest)
    extension = getattr(module, name, None)
    if not isinstance(extension, Mapping):
        fault = f"'{name}' is not a dict" if hasattr(module, name) else f"it has no '{name}'"
        raise RequestError(f"{file}: {fault}: define one, or name another by FILE.py:NAME")
    known = Extension.__annotations__
    for key, value in extension.items():
        if key not in known:
            similar = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"choose from {', '.join(known)}"
            raise RequestError(f"{file}: {name} has an unknown key '{key}'; {hint}")
        if key == "modules" and not isinstance(value, Mapping):
            raise RequestError(f"{file}: 'modules' of {name} is not a dict")
        if key not in ("modules", "transform") and not callable(value):
            raise RequestError(f"{file}: '{key}' of {name} is not a function")
    return Extension(**extension), digest


@lru_cache
def _run(path: Path, code: bytes, digest: str) -> ModuleType:
    """Run the bytes that were hashed as a module, without writing bytecode beside the file."""
    module = ModuleType(f"tljax_extension_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    try:
        exec(compile(code, path, "exec"), module.__dict__)  # noqa: S102 - the purpose of --extension
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        frames = [x for x in extract_tb(error.__traceback__) if x.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        raise RequestError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module
