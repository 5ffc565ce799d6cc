"""A reader of torch's pickles that cannot execute code.

A pickle is a program that refers to functions by name and calls them. Python's unpickler reads it
here, but names are never resolved and nothing is imported. Functions that build tensors are
replaced by stand-ins that return a description: the position of the elements in the file. All other
classes and functions become an `Inert`, which accepts any operation and does nothing. Time and
memory are linear in the size of the pickle, even for malicious pickles.
"""

import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes  # noqa: F401  registers the numpy dtypes bfloat16 and float8_*
import numpy as np

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
"""Dtype of the elements by the name of torch's storage class."""

# Dtypes without a storage class: torch stores plain bytes, and the dtype separately.
_UNTYPED = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements ``offset`` to ``offset + numel`` of the storage ``key`` of the file.

    ``offset`` and ``numel`` are unchecked and may be any object.
    """

    dtype: np.dtype
    key: str
    offset: Any
    numel: Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """Description of a tensor. The last three fields are unchecked and may be any object."""

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    stride: Any


class DamagedError(ValueError):
    """The file is truncated or damaged."""


class _RefusedError(ValueError):
    """The pickle is valid, but not supported or not safe."""


class Pickle(NamedTuple):
    """The contents of one pickle.

    Attributes:
        root: the pickled object.
        itemsizes: bytes per element of each storage in the pickle, by key.
    """

    root: object
    itemsizes: dict[str, int]


def load(stream: IO[bytes]) -> Pickle:
    """Read one pickle and leave the stream at its end.

    Dicts keep only entries with string keys. Objects of other classes become the dict of their
    items, or else of their attributes.

    Raises:
        DamagedError: the pickle is truncated or invalid.
        ValueError: the pickle refers to a function of Python's standard library that does more than
            describe data, or contains an unsupported kind of tensor.
    """
    unpickler = _Unpickler(stream)
    try:
        return Pickle(unpickler.load(), unpickler.itemsizes)
    except _RefusedError:
        raise
    except _INVALID as error:
        raise DamagedError("the pickle is invalid") from error


_INVALID = (
    *(AttributeError, EOFError, LookupError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error),
)


# Stand-ins for the functions that a pickle refers to. They must accept any arguments.


def _rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, *rest: object
) -> Tensor:
    """Describe a tensor; ``rest`` is requires_grad, hooks, dtype (version 3 only) and metadata."""
    if not isinstance(storage, Storage):
        raise TypeError("storage")
    match rest[2:]:
        case (np.dtype() as dtype, *metadata):
            pass
        case (Inert(), *_):
            raise _RefusedError("it contains a tensor of an unsupported dtype; save it as float32")
        case metadata:
            dtype = storage.dtype
    if any(metadata):
        raise _RefusedError("it contains a conjugate or negative view; save the resolved tensor")
    return Tensor(storage, dtype, offset, shape, stride)


def _rebuild_from_type(function: object, _: object, arguments: Any, *__: object) -> Tensor:
    """Describe a tensor of a subclass, or with attributes."""
    if function is not _rebuild_tensor:
        raise TypeError("function")
    return _rebuild_tensor(*arguments[:_MAX_ARGUMENTS])


def _dictionary(pairs: object = None, *_: object) -> dict[str, object]:
    """Build ``OrderedDict()``, or ``OrderedDict([[key, value], ...])`` from Python 2."""
    result = {}
    if isinstance(pairs, list):
        for pair in pairs:
            match pair:
                case [str(key), value]:
                    result[key] = value
        pairs.clear()  # repeated use of one list would take quadratic time
    return result


class Inert(dict[str, object]):
    """Stand-in for any other class or function and for its results; keeps items of dicts."""

    __slots__ = ()

    def __call__(self, *_: object) -> "Inert":
        """Return a new stand-in, whatever the arguments."""
        return Inert()

    def append(self, _: object) -> None:
        """Ignore the element of a list."""

    extend = append


_DTYPES = {name: np.dtype(name) for name in (*STORAGES.values(), *_UNTYPED)}
_GLOBALS: dict[str, Callable[..., object] | np.dtype] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{storage}": _DTYPES[name] for storage, name in STORAGES.items()},
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    **{f"torch._utils._rebuild_tensor{version}": _rebuild_tensor for version in ("", "_v2", "_v3")},
    **{f"torch._utils._rebuild_parameter{x}": lambda data, *_: data for x in ("", "_with_state")},
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "collections.OrderedDict": _dictionary,
}

# Ordinary checkpoints refer to these modules of the standard library, which describe data, and to
# two functions, whose calls represent annotations and bytes.
_DATA_MODULES = {
    *("argparse", "array", "builtins", "collections", "copyreg", "dataclasses", "datetime"),
    *("decimal", "enum", "fractions", "functools", "ipaddress", "itertools", "logging", "optparse"),
    *("json", "math", "numbers", "pathlib", "random", "re", "signal", "string", "time", "types"),
    *("typing", "uuid", "zoneinfo"),
}
_DATA_FUNCTIONS = {("operator", "getitem"), ("_codecs", "encode")}
_CODE = {"breakpoint", "compile", "delattr", "eval", "exec", "globals", "input", "open", "setattr"}


def _is_data(module: str, name: str) -> bool:
    """Return True if a name is harmless; packages outside the standard library always are."""
    names, modules = pickle._compat_pickle.NAME_MAPPING, pickle._compat_pickle.IMPORT_MAPPING  # pyright: ignore[reportAttributeAccessIssue]
    module, name = names.get((module, name), (modules.get(module, module), name))  # from Python 2
    package = module.partition(".")[0]
    if package not in sys.stdlib_module_names:
        return not f"{module}.{name}".startswith("torch._utils._rebuild_")
    is_data = package in _DATA_MODULES and name not in _CODE and "__" not in name
    return is_data or (module, name) in _DATA_FUNCTIONS


_MAX_ARGUMENTS = 8  # torch's functions have fewer; passing a million to each call would take long

# These opcodes are not supported. DICT hashes its keys, which takes long for deeply nested tuples;
# large integers take quadratic time; extensions are registered by code.
_UNSUPPORTED = b"".join(
    (pickle.DICT, pickle.LONG4, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX)
)


class _Unpickler(pickle._Unpickler):
    """Python's unpickler without name resolution, which hashes only strings.

    The faster C implementation is not used: it allocates a memo as long as the largest index in the
    file, and its opcodes cannot be replaced.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="latin-1")  # for strings from Python 2
        self.stack: list[Any] = []
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; nothing is imported."""
        full = f"{module}.{name}"
        if full in _GLOBALS:
            return _GLOBALS[full]
        if not _is_data(module, name):
            raise _RefusedError(
                f"refused, because this file refers to {full!r:.80}, which is not data; "
                "save it as safetensors or as a plain state dict"
            )
        return Inert()

    def persistent_load(self, pid: object) -> Storage | Inert:
        """Return a storage, which is outside of the pickle, or a class saved with its source."""
        match pid:
            case ("module", Inert() as stand_in, *_):
                return stand_in
            # In legacy files a storage may be part of another one.
            case ("storage", np.dtype() as dtype, str(key), _, _, (_, offset, numel)):
                pass
            case ("storage", np.dtype() as dtype, str(key), _, numel, *_):
                offset = 0
            case _:
                raise TypeError("persistent id")
        self.itemsizes.setdefault(key, dtype.itemsize)
        return Storage(dtype, key, offset, numel)

    def _call(self) -> None:
        """Call a stand-in; nothing else on the stack is callable."""
        arguments = self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError("arguments")
        self.stack[-1] = self.stack[-1](*arguments[:_MAX_ARGUMENTS])

    def _set_state(self) -> None:
        """Replace an empty stand-in by the dict of its attributes; ignore other states."""
        state, target = self.stack.pop(), self.stack.pop()
        is_empty = isinstance(target, Inert) and not target
        self.stack.append(state if is_empty and isinstance(state, dict) else target)

    def _update(self, items: list[Any]) -> None:
        """Update a dict, dropping entries without string keys, such as optimizer states."""
        pairs = zip(items[::2], items[1::2], strict=False)
        self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())  # pyright: ignore[reportAttributeAccessIssue]

    _original = pickle._Unpickler.dispatch
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: run for code, run in _original.items() if code not in _UNSUPPORTED},
        # Python's own would first allocate the number of bytes that the file claims.
        pickle.BYTEARRAY8[0]: _original[pickle.BINBYTES8[0]],
        # A set is read as a list.
        pickle.EMPTY_SET[0]: _original[pickle.EMPTY_LIST[0]],
        pickle.ADDITEMS[0]: _original[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: _original[pickle.TUPLE[0]],
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _set_state,
    }
