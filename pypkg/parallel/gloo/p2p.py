"""Point-to-point messages with the semantics of NCCL: sends do not block, order is kept.

A send of gloo blocks until the receiver takes the message, and its tag counts the operations of the
whole group. Pipeline schedules therefore deadlock or mix up their messages. Here each process has a
mailbox: threads read TCP connections and queue messages by group and sender.

A message consists of the length of a JSON line, the line with channel, dtype and shape, and the
bytes of an array. No part of a message is executed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor

from pypkg.parallel.endpoints import own_host
from pypkg.parallel.gloo.collectives import Done
from pypkg.parallel.gloo.groups import ProcessGroup, group_of
from pypkg.parallel.host_memory import to_host

logger = logging.getLogger("pypkg")

Channel = tuple[int, int]  # number of the group, rank of the sender in it

_TIMEOUT = 1800.0  # seconds that a receive waits for its message, as with NCCL
_LENGTH = 4  # bytes of the length of the JSON line, big-endian
_LONGEST_LINE = 1 << 16  # bytes; a connection that announces a longer one is closed


class Mailbox:
    """The incoming messages of a process, and its connections to other mailboxes."""

    def __init__(self) -> None:
        self._host = own_host()
        self._server = socket.create_server((self._host, 0), backlog=1024)
        self._queues: defaultdict[Channel, queue.SimpleQueue] = defaultdict(queue.SimpleQueue)
        self._connections: dict[str, socket.socket] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """host:port of this mailbox."""
        return f"{self._host}:{self._server.getsockname()[1]}"

    def put(self, address: str, channel: Channel, array: np.ndarray) -> None:
        """Sends ``array`` to the mailbox at ``address``.

        Raises:
            TypeError: the elements are Python objects.
        """
        if array.dtype.hasobject:
            raise TypeError(f"an array of {array.dtype} cannot be sent; expected numbers")
        if address not in self._connections:
            host, _, port = address.rpartition(":")
            connected = socket.create_connection((host, int(port)))
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[address] = connected
        connection = self._connections[address]
        line = json.dumps([*channel, array.dtype.str, array.shape]).encode()
        connection.sendall(len(line).to_bytes(_LENGTH, "big") + line)
        connection.sendall(array.reshape(-1).view(np.uint8).data)

    def get(self, channel: Channel) -> np.ndarray:
        """Waits for the next message of a channel and returns its array.

        Raises:
            RuntimeError: none arrives within 1800 seconds.
        """
        try:
            return self._queue(channel).get(timeout=_TIMEOUT)
        except queue.Empty as error:
            number, sender = channel
            raise RuntimeError(
                f"no message from rank {sender} of group {number} in {_TIMEOUT:g} s"
            ) from error

    def _queue(self, channel: Channel) -> queue.SimpleQueue:
        with self._lock:
            return self._queues[channel]

    def _accept(self) -> None:
        while True:
            accepted, _ = self._server.accept()
            threading.Thread(target=self._read, args=(accepted,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(EOFError, OSError):  # the other process has ended
            while True:
                try:
                    channel, array = _announced(connection)
                except ValueError as error:
                    logger.warning(
                        "a connection from %s was closed: its data is not a message of a rank (%s)",
                        *(connection.getpeername()[0], error),
                    )
                    return
                _received(connection, array.reshape(-1).view(np.uint8))
                self._queue(channel).put(array)


def _announced(connection: socket.socket) -> tuple[Channel, np.ndarray]:
    """Reads the header of the next message: its channel, and an empty array for its bytes.

    Raises:
        EOFError: the connection has ended.
        ValueError: the bytes are not a valid header.
    """
    prefix = _received(connection, np.empty(_LENGTH, np.uint8))
    length = int.from_bytes(prefix.tobytes(), "big")
    if length > _LONGEST_LINE:
        raise ValueError(f"it begins with {prefix.tobytes()!r}")
    line = _received(connection, np.empty(length, np.uint8)).tobytes()
    try:
        number, sender, dtype, shape = json.loads(line)
        channel, array = (int(number), int(sender)), np.empty(shape, np.dtype(dtype))
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{line[:80]!r}: {error}") from error
    if array.dtype.hasobject:
        raise ValueError(f"{line[:80]!r}: elements of {array.dtype}")
    return channel, array


def _received(connection: socket.socket, into: np.ndarray) -> np.ndarray:
    """Fills the uint8 array ``into`` from the connection and returns it.

    Raises:
        EOFError: the connection ends before the array is full.
    """
    left = into.data
    while left:
        count = connection.recv_into(left, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        left = left[count:]
    return into


class Receipt:
    """A posted receive: the task object that Paddle expects.

    Args:
        tensor: overwritten with the message by ``wait``.
        posted: the receives of the channel that have no message yet, in the order of posting.
    """

    def __init__(
        self, channel: Channel, tensor: Tensor, mailbox: Mailbox, posted: deque[Receipt]
    ) -> None:
        self._channel, self._tensor, self._mailbox = channel, tensor, mailbox
        self._posted = posted
        self._is_done = False
        posted.append(self)

    @paddle.no_grad()
    def wait(self, *_: object) -> bool:
        while not self._is_done:
            self._posted.popleft()._take()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._is_done

    def _take(self) -> None:
        """
        Raises:
            RuntimeError: the message has another dtype or number of elements than the tensor.
        """
        own, sent = to_host(self._tensor), self._mailbox.get(self._channel)
        if (sent.dtype, sent.size) != (own.dtype, own.size):
            number, sender = self._channel
            raise RuntimeError(
                f"rank {sender} of group {number} has sent {_kind(sent)}, but {_kind(own)} is "
                "expected: the ranks disagree about the tensor that they exchange"
            )
        np.copyto(own, sent.reshape(own.shape))
        self._is_done = True


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


class _Methods:
    """The send and receive methods of gloo's process groups."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._posted: defaultdict[Channel, deque[Receipt]] = defaultdict(deque)
        self._batches: dict[int, list[Receipt]] = {}  # receives of an open batch, by group

    def send(
        self, group: ProcessGroup, tensor: Tensor, destination: int, sync_op: bool = True
    ) -> Done:
        known = group_of(group)
        array = np.ascontiguousarray(to_host(tensor))
        self._mailbox.put(known.mailboxes[destination], (known.number, group.rank()), array)
        return Done()

    def receive(
        self, group: ProcessGroup, tensor: Tensor, source: int, sync_op: bool = True
    ) -> Receipt:
        channel = group_of(group).number, source
        receipt = Receipt(channel, tensor, self._mailbox, self._posted[channel])
        if id(group) in self._batches:
            self._batches[id(group)].append(receipt)
        elif sync_op:
            receipt.wait()
        return receipt

    def start_batch(self, group: ProcessGroup) -> None:
        self._batches[id(group)] = []

    def end_batch(self, group: ProcessGroup, tasks: object = None) -> None:
        for receipt in self._batches.pop(id(group)):
            receipt.wait()


def install() -> str:
    """Replaces the send and receive methods of gloo's groups; returns the mailbox's host:port."""
    mailbox = Mailbox()
    methods = _Methods(mailbox)
    replaced: dict[str, Callable[..., object]] = {
        "send": methods.send,
        "send_on_calc_stream": methods.send,
        "recv": methods.receive,
        "recv_on_calc_stream": methods.receive,
        "_start_coalescing": methods.start_batch,
        "_end_coalescing": methods.end_batch,
    }
    for name, method in replaced.items():
        setattr(ProcessGroup, name, _as_method(method))
    return mailbox.address


def _as_method(function: Callable[..., object]) -> Callable[..., object]:
    """Wraps ``function`` so that it gets the group: a bound method as class attribute would not."""

    @paddle.no_grad()
    def method(group: ProcessGroup, *arguments: object, **options: object) -> object:
        return function(group, *arguments, **options)

    return method
