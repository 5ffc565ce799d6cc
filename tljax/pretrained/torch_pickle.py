"""A reader for the pickles of torch that cannot run code.

A pickle is a program: it names functions and calls them. Here a name finds only the stand-ins of
``_GLOBALS``, which bear any argument and do nothing but describe: the result is lists, dicts,
numbers and `Tensor` descriptions, which say where in the file the elements are. Time and memory are
linear in the size of the pickle, whatever it holds.
"""

import pickle
import struct
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

    Dicts keep only entries whose key is a string. What is no tensor, number, text, list, tuple or
    dict is None.

    Raises:
        DamagedError: the pickle is cut off, or no program that torch would write.
        ValueError: the pickle asks for more than the contents of a state dict.
    """
    start = stream.tell()
    unpickler = _Unpickler(stream)
    try:
        return Pickle(unpickler.load(), unpickler.itemsizes)
    except _UnknownNameError as error:
        stream.seek(start)
        # Among the objects in checkpoints only torch.nn.Module has this attribute.
        if b"_parameters" in stream.read(1 << 20):
            raise ValueError(
                f"this file holds a whole model ({error}), not its weights; load it where its "
                "code is at hand and save model.state_dict()"
            ) from None
        raise ValueError(
            f"refused, because weights are data and this file asks for {error}; "
            "re-save it as safetensors or as a plain state dict"
        ) from None
    except _SENSELESS as error:
        raise DamagedError("the pickle makes no sense") from error


class _UnknownNameError(Exception):
    """A pickle asks for what is not in ``_GLOBALS``."""


_SENSELESS = (
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    UnicodeError,
    pickle.UnpicklingError,
    struct.error,
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
        case metadata:
            dtype = storage.dtype
    if any(metadata):
        raise ValueError("it holds a conjugate or negative view; save such a tensor resolved")
    return Tensor(storage, dtype, offset, shape, stride)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _dictionary(pairs: object = None, *_: object) -> dict[str, object]:
    """OrderedDict(), defaultdict(list), and the OrderedDict([[key, value], ...]) of Python 2."""
    made = {}
    if isinstance(pairs, list):
        for pair in pairs:
            match pair:
                case [str(key), value]:
                    made[key] = value
        pairs.clear()  # building from one list again and again would be quadratic
    return made


def _nothing(*_: object) -> None:
    """For what is no weight: devices, sets, numpy scalars, random states."""


_DTYPES = {name: np.dtype(name) for name in (*STORAGES.values(), *_UNTYPED)}
_GLOBALS: dict[str, Callable[..., object] | np.dtype] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{storage}": _DTYPES[name] for storage, name in STORAGES.items()},
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _dictionary,
    **dict.fromkeys(("collections.Counter", "torch.Size", "torch.device"), _nothing),
    **dict.fromkeys(("numpy.dtype", "numpy.ndarray", "_codecs.encode"), _nothing),
    **{
        f"{module}.{name}": _nothing
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("scalar", "_reconstruct")
    },
    **{
        f"{module}.{kind.__name__}": _nothing
        for module in ("builtins", "__builtin__")
        for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, tuple)
    },
}


# What Python's own unpickler does with these is harmless, whatever stands on the stack.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
)


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, with the opcodes that torch uses and no others.

    Not its faster twin in C, whose opcodes cannot be taken away: that one hashes whatever a file
    makes a key, a tuple too that is a million deep or its own square sixty times over, and makes
    its memo as long as the largest index in the file.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="latin-1")  # of the strings of Python 2
        self.stack: list[Any] = []
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in; nothing is imported."""
        if f"{module}.{name}" not in _GLOBALS:
            raise _UnknownNameError(f"{f'{module}.{name}'!r:.80}")
        return _GLOBALS[f"{module}.{name}"]

    def persistent_load(self, pid: object) -> Storage:
        """A storage: what torch keeps outside of the pickle."""
        match pid:
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
        # No call of torch's has more arguments; a million, again and again, would cost time.
        if not (isinstance(arguments, tuple) and len(arguments) <= 8):
            raise TypeError("arguments")
        self.stack[-1] = self.stack[-1](*arguments)

    def _update(self, items: list[Any]) -> None:
        """Drops the entries that text does not name: optimizer states, never weights."""
        pairs = zip(items[::2], items[1::2], strict=False)
        self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())  # pyright: ignore[reportAttributeAccessIssue]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{
            ours[0]: pickle._Unpickler.dispatch[pythons[0]]
            for ours, pythons in (
                *zip(_OPCODES, _OPCODES, strict=True),
                # Python's own would first make room for as many bytes as the file claims.
                (pickle.BYTEARRAY8, pickle.BINBYTES8),
                # A set is read as a list: nothing but text is ever hashed.
                (pickle.EMPTY_SET, pickle.EMPTY_LIST),
                (pickle.ADDITEMS, pickle.APPENDS),
                (pickle.FROZENSET, pickle.TUPLE),
                # The attributes of an object are no weights.
                (pickle.BUILD, pickle.POP),
            )
        },
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
    }
