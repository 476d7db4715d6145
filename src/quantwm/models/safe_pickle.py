"""Pickles read as data: nothing that they name is imported, nothing that they hold is called.

`torch.save` of a whole module writes a program for Python's pickle machine. Run by `pickle`, such
a program imports and calls whatever it likes. `parse` runs the same program on a machine of its
own that knows containers, numbers, tensors and names, and no way to reach anything else: a class
that it is told to build becomes an `Inert` record of what would have been given to it.
"""

import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

import torch

from quantwm.errors import CorruptFileError
from quantwm.models.pickle_names import DATA, STORAGES, Name, is_inert

MAX_BYTES = 16 * 2**20
MAX_OPERATIONS = 500_000
"""Twenty times what a DINO-WM checkpoint has; bounds memory at a few hundred bytes each."""
_MAX_DIMENSIONS = 8


@dataclass(eq=False)
class Inert:
    """What stands in for an object: its class's name, its arguments, and its attributes."""

    kind: Name
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A tensor's memory, still in the file: `numel` elements of `dtype` in the entry `key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor that is still in the file; its view lies within its storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def parse(program: bytes, storage: Callable[[StorageRef], None], where: str) -> Any:
    """What a pickle holds, as dictionaries, lists, tuples, sets, text, numbers and the stand-ins.

    Args:
        program: of pickle protocol 2 to 5.
        storage: is told of every storage that the pickle declares; raises if there is none such.
        where: the file, for messages.

    Raises:
        CorruptFileError: it names a global that is not allowed, does something else that a saved
            model has no need of, or is damaged.
    """
    if len(program) > MAX_BYTES:
        raise CorruptFileError(
            f"{where}: its pickle has {len(program)} bytes, more than the {MAX_BYTES} that a saved "
            "model may need"
        )
    machine = _Machine(storage, where)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if number >= MAX_OPERATIONS:
                machine.refuse(f"has more than {MAX_OPERATIONS} operations")
            if opcode.name == "STOP":
                return machine.result()
            machine.execute(opcode.name, argument)
    # What pickletools and malformed arguments raise, CorruptFileError not among them.
    except (ValueError, LookupError, TypeError, struct.error, OverflowError, EOFError) as error:
        reason = str(error)[:200]
        raise CorruptFileError(f"{where}: its pickle is damaged: {reason}") from error
    raise CorruptFileError(f"{where}: its pickle is cut off")


class _Machine:
    """The stack, the marks and the memo of one program."""

    def __init__(self, storage: Callable[[StorageRef], None], where: str) -> None:
        self._storage, self._where = storage, where
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def refuse(self, what: str) -> NoReturn:
        raise CorruptFileError(f"{self._where}: its pickle {what}; nothing of it was executed")

    def result(self) -> Any:
        if len(self._stack) != 1 or self._below:
            raise ValueError("it ends with an unfinished object")
        return self._stack[0]

    def execute(self, opcode: str, argument: Any) -> None:
        if opcode in _IGNORED:
            return
        if opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _OPERATIONS:
            _OPERATIONS[opcode](self, argument)
        else:
            self.refuse(f"uses the operation {opcode}, which saved models have no need of")

    def mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def tuple_of(self, count: int | None) -> None:
        if count is None:
            items = tuple(self._since_mark())
            self._stack.append(items)
            return
        if len(self._stack) < count:
            raise ValueError("a tuple of values that are not there")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(items)

    def append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            self.refuse(f"appends to a {type(target).__name__}")
        target.extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_items(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            self.refuse(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self, _: Any) -> None:
        items, target = self._since_mark(), self._stack[-1]
        if type(target) is not set:
            self.refuse(f"adds to a {type(target).__name__}")
        target.update(map(_key, items))

    def frozenset_of(self, _: Any) -> None:
        items = frozenset(map(_key, self._since_mark()))
        self._stack.append(items)

    def stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            self.refuse("names a global by something else than text")
        self._push_name(module, name)

    def text_global(self, argument: str) -> None:
        self._push_name(*argument.split(" ", 1))

    def _push_name(self, module: str, name: str) -> None:
        found = Name("builtins" if module == "__builtin__" else module, name)
        known = found in STORAGES or found in DATA or found in _BUILDERS
        if not known and not is_inert(found):
            self.refuse(f"asks for {str(found)[:200]!r}, which is no part of a DINO-WM model")
        self._stack.append(found)

    def reduce(self, _: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple:
            self.refuse(f"gives a {type(args).__name__} as arguments")
        if isinstance(function, Name) and function in _BUILDERS:
            self._stack.append(_BUILDERS[function](*args))
        elif isinstance(function, Name) and is_inert(function):
            self._stack.append(Inert(function, args))
        else:
            what = function if isinstance(function, Name) else f"a {type(function).__name__}"
            self.refuse(f"calls {what}")

    def new_object(self, _: Any) -> None:
        args, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, Name) or not is_inert(kind) or type(args) is not tuple:
            what = kind if isinstance(kind, Name) else f"a {type(kind).__name__}"
            self.refuse(f"makes an object of {what}")
        self._stack.append(Inert(kind, args))

    def build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is dict and type(state) is dict:
            return  # attributes of an OrderedDict, such as a state dict's versions
        if not isinstance(target, Inert):
            self.refuse(f"sets attributes of a {type(target).__name__}")
        if type(state) is dict:
            target.state = state
        else:
            # Slots or a form of its own: no class of DINO-WM's has such, so it stays unread.
            target.state = {}

    def persistent(self, _: Any) -> None:
        described = self._stack.pop()
        if type(described) is not tuple or len(described) != 5 or described[0] != "storage":
            self.refuse("refers to something outside of it that is no tensor storage")
        _, kind, key, _, numel = described
        if not isinstance(kind, Name) or kind not in STORAGES:
            self.refuse("has a storage of an unknown type")
        if type(key) is not str or not re.fullmatch(r"[0-9]{1,9}", key):
            self.refuse("has a storage whose key is no number")
        _check_counts((numel,), "storage size")
        reference = StorageRef(key, STORAGES[kind], numel)
        self._storage(reference)
        self._stack.append(reference)


def _key(value: Any) -> Any:
    # Not tuples: hashing one that shares its parts takes exponential time.
    if value is None or type(value) in {str, int, float, bool, bytes, TensorRef, Inert, Name}:
        return value
    raise ValueError(f"a {type(value).__name__} as a dictionary's key or in a set")


def _check_counts(values: tuple[Any, ...], what: str) -> None:
    if type(values) is not tuple or not all(type(v) is int and 0 <= v < 2**48 for v in values):
        raise ValueError(f"a {what} that is no count")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    """What follows the strides (gradient, hooks, metadata) does not change the values."""
    if not isinstance(storage, StorageRef):
        raise ValueError("a tensor without a storage")
    _check_counts((offset,), "storage offset")
    _check_counts(shape, "shape")
    _check_counts(stride, "stride")
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a tensor whose shape and strides do not belong together")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if prod(shape) and (last >= storage.numel or prod(shape) > storage.numel):
        raise ValueError(f"a tensor {shape} that reaches beyond its {storage.numel} elements")
    return TensorRef(storage, offset, shape, stride)


def _parameter(tensor: Any, *_: Any) -> TensorRef:
    if not isinstance(tensor, TensorRef):
        raise ValueError("a parameter that is no tensor")
    return tensor


def _dictionary(*args: Any) -> dict[Any, Any]:
    if not args:
        return {}
    (pairs,) = args
    if type(pairs) is not list or not all(type(p) in {tuple, list} and len(p) == 2 for p in pairs):
        raise ValueError("an ordered dictionary of something else than pairs")
    return {_key(key): value for key, value in pairs}


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in {list, tuple}:
        raise ValueError("a set of something else than a list")
    return {_key(item) for item in items}


def _size(items: Any = ()) -> tuple[int, ...]:
    size = tuple(items) if type(items) in {list, tuple} else (None,)
    _check_counts(size, "shape")
    return size


_BUILDERS: Mapping[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _dictionary,
    Name("collections", "defaultdict"): lambda *_: {},
    Name("builtins", "set"): _set,
    Name("builtins", "frozenset"): lambda items=(): frozenset(_set(items)),
    Name("torch", "Size"): _size,
    Name("torch", "device"): lambda *args: Inert(Name("torch", "device"), args),
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
"""The only functions that a program can call, all of them above."""

_IGNORED = frozenset({"PROTO", "FRAME"})
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda machine, _: machine.tuple_of(None),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "FROZENSET": _Machine.frozenset_of,
    "GLOBAL": _Machine.text_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
