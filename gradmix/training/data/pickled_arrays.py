"""Dictionaries of numbers, strings and arrays from pickles of unknown origin, by a reader that can do nothing else.

A pickle is a program: it names functions and has them called. Python's own reader, also one that admits numpy's
functions alone, hands a file live objects: an array of objects over bytes of the file's choice ends the process. This
one takes the instructions as :mod:`pickletools` reads them, and follows the few that dictionaries, lists and plain
arrays are written with. What a file names becomes a word out of a list of seven, which nothing calls; an array is made
here, of a plain dtype, a shape and bytes that are at hand. Time and memory grow with the file's length: every array and
text costs its bytes once, numbers are short, and lists and dictionaries few.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_CONTAINERS = 1000
"""Lists and dictionaries in one file: a batch of CIFAR has five."""

_LONGEST_NUMBER = 512  # bits: no label is longer, and work on long ones grows faster than they do
_DEEPEST_MARK = 100
_MOST_DIMENSIONS = 32
_PLAIN = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")

_NAMES = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # bytes in the protocols before 3
    ("builtins", "bytes"): "bytes",  # none of them, likewise
    ("__builtin__", "bytes"): "bytes",
} | {
    (f"numpy.{core}.{module}", name): name  # numpy 2 renamed its core
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


@dataclass(frozen=True)
class _Name:
    """Stands for what a file names."""

    word: str


@dataclass(eq=False)
class _Dtype:
    """A plain dtype: its code, such as ``i8``, and its byte order."""

    code: str
    order: str = "="

    def to_numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass(eq=False)
class _Unbuilt:
    """An array of which shape, dtype and bytes are still to come, and where it was memoised meanwhile."""

    memoised: list[int] = field(default_factory=list)
    built: bool = False


class _Arguments(tuple[Any, ...]):
    """A tuple that holds more than numbers and texts: arguments, which are no values of a dictionary."""

    __slots__ = ()


_SCALARS = (type(None), bool, int, float, str, bytes)
_VALUES = (*_SCALARS, list, dict, np.ndarray)


def loads(content: bytes) -> Any:
    """Read a pickle of plain values: texts, numbers, lists, dictionaries by text, and arrays, read-only.

    Written by Python 2 or 3 in any protocol, with numpy 1 or 2. Byte strings of Python 2 are read as Latin-1; numpy's
    scalars become Python's numbers.

    Args:
        content: The pickle.

    Raises:
        pickle.UnpicklingError, ValueError, IndexError, KeyError, TypeError: It is damaged, or asks for something else.
    """
    machine = _Machine(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at escapes that are none
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name not in _OPERATIONS:
                raise pickle.UnpicklingError(f"the instruction {instruction.name} is not admitted")
            if isinstance(argument, int) and argument.bit_length() > _LONGEST_NUMBER:
                raise pickle.UnpicklingError("a number is too long")
            _OPERATIONS[instruction.name](machine, argument)
    return machine.value()


class _Machine:
    """Pickle's stack machine, with the instructions admitted."""

    def __init__(self, content: bytes) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks of the marks that are open
        self._memo: dict[int, Any] = {}
        self._containers = 0
        # Once for the bytes of a text, once for the array that is made of them.
        self._bytes_left = 2 * len(content)

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def value(self) -> Any:
        """The topmost value, if it is one that a dictionary may hold."""
        return _check_value(self._stack.pop())

    def mark(self) -> None:
        if len(self._below) >= _DEEPEST_MARK:
            raise pickle.UnpicklingError(f"more than {_DEEPEST_MARK} marks are open")
        self._below.append(self._stack)
        self._stack = []

    def pop_to_mark(self) -> list[Any]:
        """Pop the values pushed since the last mark."""
        found, self._stack = self._stack, self._below.pop()
        return found

    def memoise(self, place: int | None) -> None:
        value = self._stack[-1]
        place = len(self._memo) if place is None else place
        self._memo[place] = value
        if isinstance(value, _Unbuilt):
            value.memoised.append(place)

    def recall(self, place: int) -> None:
        self.push(self._memo[place])

    # --------------------------------------------------------------------------------------------- what is made of it

    def container(self, made: Any, fill: Callable[[list[Any]], None] | None = None) -> None:
        """Push a list or dictionary, filled with what was pushed since the last mark if there is ``fill``."""
        items = [] if fill is None else self.pop_to_mark()
        self._containers += 1
        if self._containers > MOST_CONTAINERS:
            raise pickle.UnpicklingError(f"more than {MOST_CONTAINERS} lists and dictionaries")
        self.push(made)
        if fill is not None:
            fill(items)

    def tuple_of_last(self, count: int) -> None:
        self.tuple_of([self.pop() for _ in range(count)][::-1])

    def tuple_of(self, items: list[Any]) -> None:
        if all(isinstance(item, _SCALARS) for item in items):
            self.push(tuple(items))
        elif any(isinstance(item, _Arguments) for item in items):
            raise pickle.UnpicklingError("arguments within arguments")
        else:
            self.push(_Arguments(items))

    def extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        target.extend(map(_check_value, items))

    def update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError(f"{len(items)} keys and values for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes)):
                raise pickle.UnpicklingError(f"a key that is a {type(key).__name__}, expected a text")
            target[key] = _check_value(value)

    def name(self, module: Any, name: Any) -> None:
        """Push the word for what a file names."""
        word = _NAMES.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if word is None:
            raise pickle.UnpicklingError(f"it names {_show(module)}.{_show(name)}, which is not admitted")
        self.push(_Name(word))

    def call(self) -> None:
        """Compute a call's result, where the function is one of :data:`_NAMES`."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError(f"a call of a {type(function).__name__.lstrip('_')}")
        match function.word, *arguments:
            case ["dtype", str() | bytes() as code, *_flags]:
                self.push(_dtype(code))
            case ["_reconstruct", _Name("ndarray"), tuple(), str() | bytes()]:
                self.push(_Unbuilt())
            case ["scalar", _Dtype() as dtype, str() | bytes() as data]:
                self.push(self.array((), dtype, "C", data).item())
            case ["_frombuffer", bytes() as data, _Dtype() as dtype, tuple() as shape, ("C" | "F") as order]:
                self.push(self.array(shape, dtype, order, data))
            case ["_frombuffer", bytes() as data, _Dtype() as dtype, tuple() as shape, "K", tuple() as axes]:
                self.push(self.array(shape, dtype, "C", data).transpose(axes))
            case ["encode", str() as text, str() as encoding]:
                if encoding != "latin1":
                    raise pickle.UnpicklingError(f"bytes in the encoding {encoding[:20]!r}")
                self.charge(len(text))
                self.push(text.encode("latin1"))
            case ["bytes"]:
                self.push(b"")
            case _:
                raise pickle.UnpicklingError(f"a call of {function.word} with other arguments than numpy writes")

    def build(self) -> None:
        """Give a dtype its byte order, or an array what it holds."""
        state, target = self.pop(), self._stack[-1]
        if not isinstance(state, tuple):
            raise pickle.UnpicklingError(f"a state that is a {type(state).__name__}")
        match target, *state:
            case [_Dtype(), int(), ("<" | ">" | "=" | "|") as order, None, None, None, int(), int(), int()]:
                target.order = order
            case [_Unbuilt(built=False), int(), tuple() as shape, _Dtype() as dtype, int() as columns_first, data]:
                array = self.array(shape, dtype, "F" if columns_first else "C", data)
                target.built = True
                self._stack[-1] = array
                for place in target.memoised:
                    self._memo[place] = array
            case _:
                raise pickle.UnpicklingError(f"a state that is none of a {type(target).__name__.lstrip('_')}")

    def array(self, shape: Any, dtype: _Dtype, order: Any, data: Any) -> npt.NDArray[Any]:
        """An array over bytes of the file, if they are as many as it takes."""
        if not isinstance(data, (str, bytes)):
            raise pickle.UnpicklingError(f"an array whose data are a {type(data).__name__}, expected bytes")
        if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
            raise pickle.UnpicklingError("an array whose shape is none")
        self.charge(len(data))
        raw = data.encode("latin1") if isinstance(data, str) else data  # a text of Python 2
        made = dtype.to_numpy()
        if math.prod(shape) * made.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array of shape {shape} and {made} with {len(raw)} bytes")
        if made.kind == "b" and raw.strip(b"\0\1"):
            raise pickle.UnpicklingError("an array of bool with other bytes than 0 and 1")
        if not raw:
            return np.broadcast_to(np.zeros((), made), shape)  # read-only, as those over bytes of the file are
        return np.frombuffer(raw, made).reshape(shape, order=order)

    def charge(self, count: int) -> None:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("it makes more bytes than it has")


def _check_value(value: Any) -> Any:
    if type(value) is not tuple and not isinstance(value, _VALUES):
        raise pickle.UnpicklingError(f"a value that is a {type(value).__name__.lstrip('_')}")
    return value


def _dtype(code: str | bytes) -> _Dtype:
    text = code.decode("latin1") if isinstance(code, bytes) else code
    found = _PLAIN.fullmatch(text)
    if found is None:
        raise pickle.UnpicklingError(f"a dtype {_show(text)}, expected numbers")
    return _Dtype(found[1], text[0] if text != found[1] else "=")


def _show(name: Any) -> str:
    return ascii(name[:60])[1:-1] if isinstance(name, str) else f"a {type(name).__name__}"


_PUSHED = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
)
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_PUSHED.split(), _Machine.push),
    "BYTEARRAY8": lambda m, content: m.push(bytes(content)),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    # Containers.
    "MARK": lambda m, _: m.mark(),
    "EMPTY_LIST": lambda m, _: m.container([]),
    "LIST": lambda m, _: m.container([], m.extend),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m.container({}),
    "DICT": lambda m, _: m.container({}, m.update),
    "SETITEM": lambda m, _: m.update([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.pop_to_mark()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.tuple_of_last(1),
    "TUPLE2": lambda m, _: m.tuple_of_last(2),
    "TUPLE3": lambda m, _: m.tuple_of_last(3),
    "TUPLE": lambda m, _: m.tuple_of(m.pop_to_mark()),
    # What was there before.
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoise),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    # What numpy writes.
    "GLOBAL": lambda m, names: m.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(*[m.pop(), m.pop()][::-1]),
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    # Of no meaning to who has the whole file.
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda *_: None),
}
