"""A reader for the pickles of torch that cannot run code.

Python's own unpickler calls whatever a file names. The stack machine here has no way to import, to
look up an attribute, or to call anything but the stand-ins of ``_GLOBALS``. It makes lists, dicts,
numbers and *descriptions* of tensors, which say where in the file the elements are. Time and memory
are linear in the size of the pickle, whatever it holds.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import IO, Any, NamedTuple, NoReturn

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
    machine = _Machine(_operations(stream))
    return Pickle(machine.run(), machine.itemsizes)


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


class _Machine:
    """Executes a pickle as far as it only says what there is."""

    def __init__(self, operations: Iterator[tuple[str, Any]]) -> None:
        self.itemsizes: dict[str, int] = {}
        self._operations = operations
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stack below each mark
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        try:
            for name, argument in self._operations:
                _OPERATIONS[name](self, argument)
            return self._stack.pop()
        except (IndexError, KeyError, TypeError) as error:
            raise DamagedError("the pickle makes no sense") from error

    def push(self, value: object) -> None:
        self._stack.append(value)

    def mark(self, _: object) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        return [self._stack.pop() for _ in range(count)][::-1]

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("APPENDS")
        self._stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Drops the entries that text does not name: optimizer states, never weights."""
        if not isinstance(self._stack[-1], dict):
            raise TypeError("SETITEMS")
        pairs = zip(items[::2], items[1::2], strict=False)
        self._stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))

    def memoize(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def find(self, name: str) -> None:
        if name not in _GLOBALS:
            self._refuse(name)
        self.push(_GLOBALS[name])

    def _refuse(self, name: str) -> NoReturn:
        try:  # Among the objects in checkpoints only torch.nn.Module has this attribute.
            module = any(argument == "_parameters" for _, argument in self._operations)
        except ValueError:
            module = False
        if module:
            raise ValueError(
                f"this file holds a whole model ({name!r:.80}), not its weights; load it where its "
                "code is at hand and save model.state_dict()"
            )
        raise ValueError(
            f"refused, because weights are data and this file asks for {name!r:.80}; "
            "re-save it as safetensors or as a plain state dict"
        )

    def reduce(self, _: object) -> None:
        function, arguments = self.pop(2)
        # No call of torch's has more arguments; a million, again and again, would cost time.
        if not (isinstance(arguments, tuple) and len(arguments) <= 8):
            raise TypeError("REDUCE")
        if not isinstance(function, FunctionType):
            raise TypeError("REDUCE")
        self.push(function(*arguments))

    def persistent_id(self, _: object) -> None:
        match self._stack.pop():
            # In legacy files, a part of another storage.
            case ("storage", np.dtype() as dtype, str(key), _, _, (_, offset, numel)):
                pass
            case ("storage", np.dtype() as dtype, str(key), _, numel, *_):
                offset = 0
            case _:
                raise TypeError("BINPERSID")
        self.itemsizes.setdefault(key, dtype.itemsize)
        self.push(Storage(dtype, key, offset, numel))


_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda *_: None),
    **dict.fromkeys(("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING", "BYTEARRAY8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Machine.push),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(None),
    "ADDITEMS": lambda machine, _: machine.to_mark(),
    "FROZENSET": lambda machine, _: machine.push(_nothing(machine.to_mark())),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.to_mark()),
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": lambda machine, _: machine.find(".".join(machine.pop(2))),
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": lambda machine, _: machine.pop(1),  # attributes of an object are no weights
    "BINPERSID": _Machine.persistent_id,
}


def _read_global(stream: IO[bytes]) -> str:
    """Two lines as they are, where pickletools would interpret backslashes."""
    return ".".join(stream.readline().decode().removesuffix("\n") for _ in range(2))


_OPCODES: dict[bytes, tuple[str, Callable[[IO[bytes]], Any]]] = {
    info.code.encode("latin-1"): (info.name, info.arg.reader if info.arg else lambda _: None)
    for info in pickletools.opcodes
    if info.name in _OPERATIONS
} | {b"c": ("GLOBAL", _read_global)}


def _operations(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The names and arguments of a pickle's opcodes, up to its end; parsing executes nothing."""
    name = ""
    while name != "STOP":
        code = stream.read(1)
        if code not in _OPCODES:
            raise DamagedError(f"the pickle stops making sense at opcode {code!r}")
        name, read_argument = _OPCODES[code]
        try:
            argument = read_argument(stream)
        except ValueError as error:
            raise DamagedError(f"the pickle stops making sense: {error}") from error
        yield name, argument
