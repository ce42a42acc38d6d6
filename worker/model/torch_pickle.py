"""The pickle in a file of ``torch.save``: the names of its tensors, and where their numbers are. Needs no torch.

Python's unpickler is not used: even one that is restricted to a few classes crashes the process on a dictionary that has
a deeply nested tuple as a key. ``pickletools`` splits the pickle into opcodes, and the few that a state dictionary consists
of are carried out here, on strings, numbers, tuples, dictionaries and the types below. (They are those that torch's own
weights-only reader knows, without lists, sets and NEWOBJ.) So nothing that a file names is imported or called, and only
strings are keys.
"""

import math
import pickletools
import re
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, NamedTuple

from worker.model.weight_arrays import Damaged, OnlyForTorch, UnusableFile

MAX_MARKS: Final = 100  # open at once; torch.save has three
MAX_RANK: Final = 32
STORAGES: Final = {  # torch's class of a storage, and safetensors' name of what it holds
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


class Function(Enum):
    """What a state dictionary's pickle calls, by the name that stands in it."""

    TENSOR = "torch._utils _rebuild_tensor_v2"
    PARAMETER = "torch._utils _rebuild_parameter"
    DICTIONARY = "collections OrderedDict"


class StorageType(NamedTuple):
    """A class of storages; ``dtype`` is safetensors' name of what it holds."""

    dtype: str


class Storage(NamedTuple):
    """Numbers in a row: ``length`` of them, in the archive's record ``data/<key>``."""

    dtype: str
    key: str
    length: int


class TensorView(NamedTuple):
    """A tensor: where it begins in its storage, its shape, and the step of each axis, all in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


KNOWN: Final[dict[str, Function | StorageType]] = {
    **{function.value: function for function in Function},
    **{f"torch {name}": StorageType(dtype) for name, dtype in STORAGES.items()},
}
TENSORS_OF_TORCH: Final = re.compile(r"torch(\.storage)? \w+Storage|torch\._utils _rebuild\w+")


def parse_state_dict(data: bytes) -> dict[str, TensorView]:
    """The tensors of a state dictionary by name; entries that are numbers or strings are left out.

    Each view lies within its storage. Raises UnusableFile for whatever is no state dictionary.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.carry_out(opcode.name, argument)
    except ValueError as error:
        raise Damaged(f"its pickle: {str(error)[:100]}") from None
    except LookupError:
        raise Damaged("its pickle takes what is not there") from None
    entries = machine.result
    if not isinstance(entries, dict):
        raise UnusableFile("holds no state dictionary; it should map the name of each weight to its tensor")
    for name, value in entries.items():
        if not isinstance(value, TensorView | int | float | str | None):
            raise UnusableFile(
                f"holds {ascii(name)[:100]}, which is no tensor; it should map the name of each weight to its tensor"
            )
    return {name: value for name, value in entries.items() if isinstance(value, TensorView)}


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.result: object = None
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._marks: list[int] = []

    def carry_out(self, opcode: str, argument: Any) -> None:
        """Raises UnusableFile for an opcode that no state dictionary has, or one that does not fit what is on the stack."""
        if opcode in CONSTANTS:
            self._stack.append(CONSTANTS[opcode](argument))
        elif opcode in STEPS:
            STEPS[opcode](self, argument)
        else:
            raise UnusableFile(f"holds more than tensors (the pickle's opcode {opcode}), which could run code")

    def mark(self, _: None) -> None:
        if len(self._marks) == MAX_MARKS:
            raise Damaged("its pickle is nested too deep")
        self._marks.append(len(self._stack))

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def stop(self, _: None) -> None:
        self.result = self._pop()

    def name(self, name: str) -> None:
        if name not in KNOWN and TENSORS_OF_TORCH.fullmatch(name):
            raise OnlyForTorch(f"holds tensors that only torch reads ({name[:100]})")
        if name not in KNOWN:
            raise UnusableFile(f"holds more than tensors ({ascii(name)[:100]}), which could run code")
        self._stack.append(KNOWN[name])

    def tuple_since_mark(self, _: None) -> None:
        self._stack.append(tuple(self._since_mark()))

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self, _: None) -> None:
        self._set(self._since_mark())

    def build(self, _: None) -> None:
        """The only state that is written is the versions of a state dictionary's modules: it is not needed."""
        if not isinstance(self._pop(), dict) or not isinstance(self._stack[-1], dict):
            raise UnusableFile("holds more than tensors (an object with a state), which could run code")

    def reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case Function.DICTIONARY, ():
                self._stack.append({})
            case Function.TENSOR, (Storage() as storage, offset, tuple(shape), tuple(strides), bool(), dict(hooks)) if (
                not hooks
            ):
                self._stack.append(_view(storage, offset, shape, strides))
            case Function.PARAMETER, (TensorView() as view, bool(), dict(hooks)) if not hooks:
                self._stack.append(view)
            case _:
                raise Damaged(
                    "its pickle calls what makes a tensor or a dictionary with other values than torch.save does"
                )

    def storage(self, _: None) -> None:
        match self._pop():
            case ("storage", StorageType(dtype), str(key), str(), length) if _is_count(length):
                self._stack.append(Storage(dtype, key, length))
            case _:
                raise Damaged("its pickle names a storage otherwise than torch.save does")

    def _pop(self) -> Any:
        if self._marks and self._marks[-1] >= len(self._stack):
            raise IndexError
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged("its pickle sets an entry of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                raise Damaged("its pickle has a name twice, or one that is no text")
            target[key] = value


def _view(storage: Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> TensorView:
    """Raises UnusableFile if the tensor is not within its storage, or has more elements."""
    if len(shape) != len(strides) or len(shape) > MAX_RANK or not all(map(_is_count, (offset, *shape, *strides))):
        raise Damaged("a tensor's offset, shape and strides should be whole numbers, 0 or more, one for each axis")
    count = math.prod(shape)
    if count == 0:
        return TensorView(storage, 0, shape, strides)  # torch lets an empty tensor begin anywhere
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= storage.length:
        raise Damaged("a tensor is larger than its storage")
    if count > storage.length:  # in memory it would be larger than the file
        raise OnlyForTorch("holds tensors that repeat their numbers, which only torch reads")
    return TensorView(storage, offset, shape, strides)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _same(value: Any) -> Any:
    return value


CONSTANTS: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _same),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
}
STEPS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "PROTO": lambda machine, version: None,
    "MARK": _Machine.mark,
    "GLOBAL": _Machine.name,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "STOP": _Machine.stop,
}
