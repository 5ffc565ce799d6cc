"""A reader for the pickles of torch that cannot run code.

A pickle is a program: it names functions and calls them. Python's own unpickler reads it, but a
name never finds what it names, and nothing is imported. What builds tensors finds a stand-in that
describes them: where in the file their elements are. All else that training scripts leave in a
checkpoint, of whatever class, becomes an `Inert` that bears everything and does nothing. Time and
memory are linear in the size of the pickle, whatever it holds.
"""

import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes  # noqa: F401  teaches numpy the names bfloat16 and float8_*
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
"""Dtype of the elements, by the name of torch's storage class."""

# Without a storage class of their own: torch saves plain bytes and names the dtype beside them.
_UNTYPED = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements ``offset`` to ``offset + numel`` of the bytes that the file calls ``key``.

    Both numbers are unchecked and may be anything.
    """

    dtype: np.dtype
    key: str
    offset: Any
    numel: Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the pickle describes it. The last three are unchecked and may be anything."""

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    stride: Any


class DamagedError(ValueError):
    """The bytes are not those that were once written."""


class _RefusedError(ValueError):
    """The pickle makes sense and is not followed."""


class Pickle(NamedTuple):
    """One pickle.

    Attributes:
        root: what was pickled.
        itemsizes: bytes per element of each storage that the pickle mentions, by key.
    """

    root: object
    itemsizes: dict[str, int]


def load(stream: IO[bytes]) -> Pickle:
    """Reads one pickle and leaves the stream just behind it.

    Dicts keep only entries whose key is a string. An object of a class that is no plain data is
    the dict of its items, else of its attributes.

    Raises:
        DamagedError: the pickle is cut off, or no program that Python would write.
        ValueError: the pickle names a function of Python's that handles more than data, or holds a
            tensor of a kind that cannot be read.
    """
    unpickler = _Unpickler(stream)
    try:
        return Pickle(unpickler.load(), unpickler.itemsizes)
    except _RefusedError:
        raise
    except _SENSELESS as error:
        raise DamagedError("the pickle makes no sense") from error


_SENSELESS = (
    *(AttributeError, EOFError, LookupError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error),
)


# The stand-ins: what a pickle gets when it asks for a function. They must bear any argument.


def _rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, *rest: object
) -> Tensor:
    """All versions: requires_grad, hooks, dtype (only in version 3) and metadata may follow."""
    if not isinstance(storage, Storage):
        raise TypeError("storage")
    match rest[2:]:
        case (np.dtype() as dtype, *metadata):
            pass
        case (Inert(), *_):
            raise _RefusedError("it holds a tensor of an unusual dtype; save it as float32")
        case metadata:
            dtype = storage.dtype
    if any(metadata):
        raise _RefusedError("it holds a conjugate or negative view; save such a tensor resolved")
    return Tensor(storage, dtype, offset, shape, stride)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _rebuild_from_type(function: object, _: object, arguments: Any, *__: object) -> Tensor:
    """A tensor of a subclass, or with attributes."""
    if function is not _rebuild_tensor:
        raise TypeError("function")
    return _rebuild_tensor(*arguments[:_MOST_ARGUMENTS])


def _dictionary(pairs: object = None, *_: object) -> dict[str, object]:
    """OrderedDict(), and the OrderedDict([[key, value], ...]) of Python 2."""
    made = {}
    if isinstance(pairs, list):
        for pair in pairs:
            match pair:
                case [str(key), value]:
                    made[key] = value
        pairs.clear()  # building from one list again and again would be quadratic
    return made


class Inert(dict[str, object]):
    """Any other class or function, and what a call of it gives; of a kind of dict the items."""

    __slots__ = ()

    def __call__(self, *_: object) -> "Inert":
        """Make an object, without a look at the arguments."""
        return Inert()

    def append(self, _: object) -> None:
        """Drop the element of a kind of list."""

    extend = append


_DTYPES = {name: np.dtype(name) for name in (*STORAGES.values(), *_UNTYPED)}
_GLOBALS: dict[str, Callable[..., object] | np.dtype] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{storage}": _DTYPES[name] for storage, name in STORAGES.items()},
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    **{f"torch._utils._rebuild_tensor{version}": _rebuild_tensor for version in ("", "_v2", "_v3")},
    **{f"torch._utils._rebuild_parameter{x}": _rebuild_parameter for x in ("", "_with_state")},
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "collections.OrderedDict": _dictionary,
}

# Of Python itself, an honest checkpoint names what describes data, and these functions: types of
# annotations and bytes are pickled as their calls.
_DATA_MODULES = {
    *("argparse", "array", "builtins", "collections", "copyreg", "dataclasses", "datetime"),
    *("decimal", "enum", "fractions", "functools", "ipaddress", "itertools", "logging", "optparse"),
    *("json", "math", "numbers", "pathlib", "random", "re", "signal", "string", "time", "types"),
    *("typing", "uuid", "zoneinfo"),
}
_DATA_FUNCTIONS = {("operator", "getitem"), ("_codecs", "encode")}
_CODE = {"breakpoint", "compile", "delattr", "eval", "exec", "globals", "input", "open", "setattr"}


def _is_data(module: str, name: str) -> bool:
    """Whether an honest checkpoint may name it; packages may name anything of their own."""
    names, modules = pickle._compat_pickle.NAME_MAPPING, pickle._compat_pickle.IMPORT_MAPPING  # pyright: ignore[reportAttributeAccessIssue]
    module, name = names.get((module, name), (modules.get(module, module), name))  # of Python 2
    package = module.partition(".")[0]
    if package not in sys.stdlib_module_names:
        return not f"{module}.{name}".startswith("torch._utils._rebuild_")
    is_data = package in _DATA_MODULES and name not in _CODE and "__" not in name
    return is_data or (module, name) in _DATA_FUNCTIONS


_MOST_ARGUMENTS = 8  # of torch's calls; passing on a million, again and again, would cost time

# Python hashes what a file makes a key, a tuple too that is a million deep or its own square sixty
# times over; large numbers cost quadratic time; extensions are registered by code.
_DROPPED = b"".join(
    (pickle.DICT, pickle.LONG4, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX)
)


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, but nothing that a file names is found, and only text is hashed.

    Not its faster twin in C, which makes its memo as long as the largest index in the file, and
    whose opcodes cannot be replaced.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="latin-1")  # of the strings of Python 2
        self.stack: list[Any] = []
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in; nothing is imported."""
        full = f"{module}.{name}"
        if full in _GLOBALS:
            return _GLOBALS[full]
        if not _is_data(module, name):
            raise _RefusedError(
                f"refused, because weights are data and this file asks for {full!r:.80}; "
                "re-save it as safetensors or as a plain state dict"
            )
        return Inert()

    def persistent_load(self, pid: object) -> Storage | Inert:
        """A storage, which torch keeps outside of the pickle; or a class beside its source code."""
        match pid:
            case ("module", Inert() as found, *_):
                return found
            # In legacy files, a part of another storage.
            case ("storage", np.dtype() as dtype, str(key), _, _, (_, offset, numel)):
                pass
            case ("storage", np.dtype() as dtype, str(key), _, numel, *_):
                offset = 0
            case _:
                raise TypeError("persistent id")
        self.itemsizes.setdefault(key, dtype.itemsize)
        return Storage(dtype, key, offset, numel)

    def _call(self) -> None:
        """Nothing on the stack can be called but the stand-ins."""
        arguments = self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError("arguments")
        self.stack[-1] = self.stack[-1](*arguments[:_MOST_ARGUMENTS])

    def _set_state(self) -> None:
        """The attributes of an object, in a dict, take its place; nothing else has any."""
        state, made = self.stack.pop(), self.stack.pop()
        bare = isinstance(made, Inert) and not made
        self.stack.append(state if bare and isinstance(state, dict) else made)

    def _update(self, items: list[Any]) -> None:
        """Drops the entries that text does not name: optimizer states, never weights."""
        pairs = zip(items[::2], items[1::2], strict=False)
        self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())  # pyright: ignore[reportAttributeAccessIssue]

    _pythons = pickle._Unpickler.dispatch
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: act for code, act in pickle._Unpickler.dispatch.items() if code not in _DROPPED},
        # Python's own would first make room for as many bytes as the file claims.
        pickle.BYTEARRAY8[0]: _pythons[pickle.BINBYTES8[0]],
        # A set is read as a list.
        pickle.EMPTY_SET[0]: _pythons[pickle.EMPTY_LIST[0]],
        pickle.ADDITEMS[0]: _pythons[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: _pythons[pickle.TUPLE[0]],
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _set_state,
    }
