"""Runs tasks in several processes, which report their progress.

The workers are forks of one process that is started for them. It loads what they share, such as a
tokenizer of hundreds of megabytes, which is then read once and in memory once. A fork of the main
process would be faster, but it would copy locks whose threads do not exist in the copy: those of a
progress bar, and those of the tokenizers library.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, TypeVar

from pypkg.errors import UserError

# Does a task and yields its reports.
Work = Callable[[Any], Iterator[Any]]
Shared = TypeVar("Shared")

_CLOSING_SECONDS = 10.0


@dataclass(frozen=True)
class _Failure:
    message: str
    is_user_error: bool


_DONE = "done"


def run_tasks(
    load: Callable[[], Shared],
    setup: Callable[[Shared], Work],
    tasks: Sequence[Any],
    num_processes: int,
) -> Generator[Any, None, None]:
    """Does all tasks and yields their reports in the order of arrival.

    The processes are killed when the iterator is closed or raises.

    Args:
        load: creates the object that the processes share, once, and starts no thread; picklable.
        setup: creates the function that does a task from this object, once in each process;
            picklable.
        tasks: the arguments of this function; picklable.
        num_processes: 1 does all tasks in this process.

    Raises:
        UserError: a task raised it, or a process was killed.
        RuntimeError: a task raised another exception; the message contains its traceback.
    """
    if num_processes == 1:
        work = setup(load())
        for task in tasks:
            yield from work(task)
        return
    workers = _Workers(load, setup, num_processes)
    try:
        yield from workers.do(list(tasks))
        workers.join()
    finally:
        workers.kill()


class _Workers:
    """The processes, seen from the main one."""

    def __init__(
        self, load: Callable[[], Shared], setup: Callable[[Shared], Work], count: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self._connections = [here for here, _ in pairs]
        ends, end = context.Pipe(duplex=False)
        self._ends: Connection = ends  # number and exit code of each worker that has ended
        theirs = [there for _, there in pairs]
        self._parent: BaseProcess = context.Process(
            target=_fork_workers, args=(theirs, end, load, setup), daemon=True
        )
        # Ctrl-C is the main process's to handle.
        with _held_back(signal.SIGINT), _one_blas_thread():
            self._parent.start()
        for connection in (*theirs, end):
            connection.close()

    def do(self, tasks: list[Any]) -> Iterator[Any]:
        """Gives out ``tasks`` and yields what is reported."""
        tasks.reverse()
        busy = [each for each in self._connections if _give_task(each, tasks)]
        while busy:
            for connection in wait(busy):
                assert isinstance(connection, Connection)
                try:
                    event = connection.recv()
                except (EOFError, OSError) as error:
                    raise self._killed(self._connections.index(connection)) from error
                if isinstance(event, _Failure):
                    raise (UserError if event.is_user_error else RuntimeError)(event.message)
                if event != _DONE:
                    yield event
                elif not _give_task(connection, tasks):
                    busy.remove(connection)

    def join(self) -> None:
        """Waits until the processes have ended, for some seconds."""
        for connection in self._connections:
            connection.close()
        self._parent.join(_CLOSING_SECONDS)

    def kill(self) -> None:
        """Ends the processes at once."""
        self._parent.terminate()
        self._parent.join(_CLOSING_SECONDS)
        if self._parent.is_alive():  # and cannot end its workers
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._parent.ident or 0, signal.SIGKILL)
            self._parent.join()
        for connection in (*self._connections, self._ends):
            connection.close()

    def _killed(self, number: int) -> UserError:
        code = None
        with contextlib.suppress(EOFError):  # the process that forked them was killed itself
            while self._ends.poll(_CLOSING_SECONDS):
                ended, code = self._ends.recv()
                if ended == number:
                    break
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with {code}"
        return UserError(
            f"a worker process {how}; if memory ran out, use fewer --workers. What is finished is "
            "kept: the same command goes on from there"
        )


def _give_task(connection: Connection, tasks: list[Any]) -> bool:
    """Hands the next task to a worker; returns False if there is none."""
    if not tasks:
        return False
    with contextlib.suppress(OSError):  # it has ended, and what it left to read says why
        connection.send(tasks.pop())
    return True


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Holds back a signal, in processes that are started meanwhile for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """A process started meanwhile holds no threads of OpenBLAS after NumPy is imported."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _fork_workers(
    connections: Sequence[Connection],
    end: Connection,
    load: Callable[[], Shared],
    setup: Callable[[Shared], Work],
) -> None:
    """The main function of the process that the workers are forked from."""
    os.setpgid(0, 0)
    numbers: dict[int, int] = {}  # of a worker by its process
    try:
        shared = load()
        gc.freeze()  # a collection would write to the pages that the workers share
        with _held_back(signal.SIGTERM):
            for number, connection in enumerate(connections):
                process = os.fork()
                if process == 0:
                    others = [each for each in (*connections, end) if each is not connection]
                    _be_worker(connection, others, setup, shared)
                numbers[process] = number
            signal.signal(signal.SIGTERM, lambda *_: _kill(numbers))
    except UserError as error:
        _send_to_all(connections, _Failure(str(error), True))
    except Exception:
        _send_to_all(connections, _Failure(traceback.format_exc(), False))
    for connection in connections:
        connection.close()
    while numbers:
        process, status = os.wait()
        with contextlib.suppress(OSError):  # the main process has gone
            end.send((numbers.pop(process), os.waitstatus_to_exitcode(status)))


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process, signal.SIGKILL)


def _send_to_all(connections: Sequence[Connection], failure: _Failure) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send(failure)


def _be_worker(
    connection: Connection,
    others: Sequence[Connection],
    setup: Callable[[Shared], Work],
    shared: Shared,
) -> NoReturn:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        for other in others:  # the main process sees a worker's end by its connection
            other.close()
        _serve(connection, setup, shared)
    finally:
        os._exit(0)


def _serve(connection: Connection, setup: Callable[[Shared], Work], shared: Shared) -> None:
    """The loop of a worker process, until the other end of the connection is closed."""
    try:
        work = setup(shared)
        while True:
            for event in work(connection.recv()):
                connection.send(event)
            connection.send(_DONE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # there are no more tasks, or the main process has ended
    except UserError as error:
        connection.send(_Failure(str(error), True))
    except Exception:
        connection.send(_Failure(traceback.format_exc(), False))
