"""Reads pickles of weights with a restricted interpreter, which calls only permitted functions.

A pickle is a program. In Python's unpickler, a few bytes can allocate a memo of four GiB, or build
nested tuples whose hash takes practically forever. This interpreter only creates dicts with plain
keys, lists, tuples, strings, numbers, and the objects that its caller permits. Its bounds:

- Time: at most ``MAX_OPCODES`` opcodes. An opcode takes constant time, or time proportional to the
  values that it pops off the stack.
- Memory: about 100 bytes per opcode. The memo is a dict and holds only stored values. Bytes are not
  copied; the result refers to their position in the buffer. A string has at most ``MAX_STRING``
  bytes, and all strings together fit into the buffer.
- Depth: only strings and numbers are hashed, compared or printed, so nothing recurses. A caller
  that traverses the result must limit the depth itself.

The opcodes are those of protocols 2 to 5 (https://docs.python.org/3/library/pickletools.html), and
the few opcodes of older protocols that name a callable.
"""

from __future__ import annotations

import collections
import contextlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

from pypkg.errors import UserError

MAX_OPCODES = 1 << 23  # a state dict of 100 000 tensors takes about 60 for each
MAX_STRING = 1 << 20  # bytes
MAX_LONG = 8  # bytes of a whole number

_MAX_ARGUMENTS = 16
_MARK = object()


class Refused(Exception):
    """The pickle refers to an object that is not permitted."""


@contextlib.contextmanager
def user_errors(path: Path, trusted: str) -> Iterator[None]:
    """Converts exceptions from reading a pickle file to ``UserError``.

    Args:
        path: the file.
        trusted: text for the message: how to load a file of trusted origin with its framework.

    Raises:
        UserError: the block raised ``Refused`` or any other exception.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Refused as error:
        raise UserError(
            f"{path} was not loaded: {error}. Only tensors, dicts, lists and plain values are "
            f"loaded, because other objects in a pickle may run code. If you trust its origin, "
            f"{trusted}"
        ) from error
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it refers to {error}, which is not in it"
        raise UserError(f"{path} is damaged or truncated ({reason}); get it again") from error


class Span(NamedTuple):
    """The position of a bytes object in the buffer: ``length`` bytes from ``offset``."""

    offset: int
    length: int


class Call(NamedTuple):
    """A function that a pickle may call. It is a tuple so that a pickle cannot modify it."""

    function: Callable[..., Any]


class Restorable(ABC):
    """An object whose state a pickle may set (opcode BUILD), with ``restore``."""

    __slots__ = ()

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Sets the state of the object.

        Raises:
            ValueError: the state is invalid.
        """


def _ordered_dict() -> collections.OrderedDict[Any, Any]:
    return collections.OrderedDict()


ORDERED_DICT = Call(_ordered_dict)  # takes no arguments: copying one would take unbounded time


class PickleReader:
    """One pickle in a buffer.

    Args:
        buffer: begins with the pickle.
        names: the objects to which the pickle may refer, by (module, name).
        find: resolves a persistent reference; None: such references raise ``Refused``.
    """

    def __init__(
        self,
        buffer: bytes | mmap,
        names: Mapping[tuple[str, str], Any],
        find: Callable[[Any], Any] | None = None,
    ) -> None:
        self._buffer, self._names, self._find = buffer, names, find
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The unpickled object.

        Raises:
            Refused: the pickle refers to an object that is not in ``names``.
            Exception: any kind, if the pickle is damaged or exceeds a bound.
        """
        for _ in range(MAX_OPCODES):
            opcode = self._bytes(1)
            if opcode == b".":
                return self._stack.pop()
            if opcode not in _OPCODES:
                raise ValueError(f"opcode {opcode!r} at byte {self._at - 1}")
            _OPCODES[opcode](self)
        raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")

    def _skip(self, length: int) -> Span:
        start = self._at
        if start + length > len(self._buffer):
            raise EOFError("it ends within its pickle")
        self._at += length
        return Span(start, length)

    def _bytes(self, length: int) -> bytes:
        start, _ = self._skip(length)
        return self._buffer[start : start + length]

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

    def _text(self, length: int) -> str:
        if length > MAX_STRING:
            raise ValueError(f"a string of {length} bytes; at most {MAX_STRING} are read")
        return self._bytes(length).decode()

    def _long(self, length: int) -> int:
        if length > MAX_LONG:
            raise ValueError(f"a number of {length} bytes")
        return int.from_bytes(self._bytes(length), "little", signed=True)

    def _line(self) -> str:
        end = self._buffer.find(b"\n", self._at, self._at + MAX_STRING)
        if end < 0:
            raise EOFError("it ends within a line of its pickle")
        return self._bytes(end + 1 - self._at)[:-1].decode()

    def _to_mark(self) -> list[Any]:
        """Pops the values above the topmost mark, and the mark, and returns the values."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_tuple(self, length: int) -> None:
        start = len(self._stack) - length
        if start < 0:
            raise ValueError("the stack is too short")
        items = tuple(self._stack[start:])
        del self._stack[start:]
        self._push(items)

    def _store(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _fetch(self, index: int) -> None:
        self._push(self._memo[index])

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items of an object that is not a dict")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, (str, int, float, type(None))):
                raise ValueError(f"a {type(key).__name__} as the key of a dict")
            target[key] = value

    def _make_dict(self, items: list[Any]) -> None:
        self._push({})
        self._set_items(items)

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("elements of an object that is not a list")
        self._stack[-1].extend(items)

    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name that is not a string")
        if (module, name) not in self._names:
            raise Refused(f"it asks for {module}.{name}")
        self._push(self._names[module, name])

    def _reduce(self) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Call) or not isinstance(arguments, tuple):
            raise ValueError(f"a call of a {type(called).__name__}")
        if len(arguments) > _MAX_ARGUMENTS:
            raise ValueError(f"a call with {len(arguments)} arguments")
        self._push(called.function(*arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Restorable):
            target.restore(state)
        elif not isinstance(target, collections.OrderedDict):  # attributes of that are ignored
            raise ValueError(f"a state for a {type(target).__name__}")

    def _refer(self) -> None:
        if self._find is None:
            raise Refused("it refers to an object outside it")
        self._push(self._find(self._stack.pop()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _append_one(self) -> None:
        value = self._stack.pop()
        self._append([value])


_OPCODES: dict[bytes, Callable[[PickleReader], Any]] = {
    b"\x80": lambda r: r._skip(1),  # PROTO
    b"\x95": lambda r: r._skip(8),  # FRAME
    b"(": lambda r: r._push(_MARK),
    b"0": lambda r: r._stack.pop(),
    b"N": lambda r: r._push(None),
    b"\x88": lambda r: r._push(True),
    b"\x89": lambda r: r._push(False),
    b"K": lambda r: r._push(r._number("<B")),
    b"M": lambda r: r._push(r._number("<H")),
    b"J": lambda r: r._push(r._number("<i")),
    b"G": lambda r: r._push(r._number(">d")),
    b"\x8a": lambda r: r._push(r._long(r._number("<B"))),
    b"V": lambda r: r._push(r._line()),
    b"X": lambda r: r._push(r._text(r._number("<I"))),
    b"\x8c": lambda r: r._push(r._text(r._number("<B"))),
    b"\x8d": lambda r: r._push(r._text(r._number("<Q"))),
    b"U": lambda r: r._push(r._text(r._number("<B"))),
    b"T": lambda r: r._push(r._text(r._number("<I"))),
    b"C": lambda r: r._push(r._skip(r._number("<B"))),
    b"B": lambda r: r._push(r._skip(r._number("<I"))),
    b"\x8e": lambda r: r._push(r._skip(r._number("<Q"))),
    b"}": lambda r: r._push({}),
    b"]": lambda r: r._push([]),
    b")": lambda r: r._push(()),
    b"t": lambda r: r._push(tuple(r._to_mark())),
    b"\x85": lambda r: r._pop_tuple(1),
    b"\x86": lambda r: r._pop_tuple(2),
    b"\x87": lambda r: r._pop_tuple(3),
    b"s": PickleReader._set_item,
    b"d": lambda r: r._make_dict(r._to_mark()),
    b"u": lambda r: r._set_items(r._to_mark()),
    b"a": PickleReader._append_one,
    b"e": lambda r: r._append(r._to_mark()),
    b"p": lambda r: r._store(int(r._line())),
    b"q": lambda r: r._store(r._number("<B")),
    b"r": lambda r: r._store(r._number("<I")),
    b"\x94": lambda r: r._store(len(r._memo)),
    b"h": lambda r: r._fetch(r._number("<B")),
    b"j": lambda r: r._fetch(r._number("<I")),
    b"c": lambda r: r._global(r._line(), r._line()),
    b"\x93": PickleReader._stack_global,
    b"R": PickleReader._reduce,
    b"b": PickleReader._build,
    b"Q": PickleReader._refer,
}
