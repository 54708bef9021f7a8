"""Runs tasks in several processes, which report their progress."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from pypkg.errors import UserError

# Does a task and yields its reports.
Work = Callable[[Any], Iterator[Any]]

_CLOSING_SECONDS = 10.0


@dataclass(frozen=True)
class _Failure:
    message: str
    is_user_error: bool


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


_DONE = "done"


def run_tasks(
    setup: Callable[[], Work], tasks: Sequence[Any], num_processes: int
) -> Generator[Any, None, None]:
    """Does all tasks and yields their reports in the order of arrival.

    The processes are killed when the iterator is closed or raises.

    Args:
        setup: creates the function that does a task, once in each process; picklable.
        tasks: the arguments of this function; picklable.
        num_processes: 1 does all tasks in this process.

    Raises:
        UserError: a task raised it, or a process was killed.
        RuntimeError: a task raised another exception; the message contains its traceback.
    """
    if num_processes == 1:
        work = setup()
        for task in tasks:
            yield from work(task)
        return
    workers = [_start(setup) for _ in range(num_processes)]
    try:
        yield from _supervise(workers, list(tasks))
        for worker in workers:
            worker.connection.close()
            worker.process.join(_CLOSING_SECONDS)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _start(setup: Callable[[], Work]) -> _Worker:
    # A fork would copy the state of threads that the tokenizers library has started here.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, setup), daemon=True)
    with _interrupts_held_back():  # workers inherit this: only the main process handles Ctrl-C
        process.start()
    there.close()
    return _Worker(process, here)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _supervise(workers: Sequence[_Worker], tasks: list[Any]) -> Iterator[Any]:
    tasks.reverse()
    busy: dict[Connection, _Worker] = {}
    for worker in workers:
        _next_task(worker, tasks, busy)
    while busy:
        ready = set(wait(list(busy)))
        for worker in [each for connection, each in busy.items() if connection in ready]:
            try:
                event = worker.connection.recv()
            except (EOFError, OSError) as error:
                raise _killed(worker) from error
            if isinstance(event, _Failure):
                raise (UserError if event.is_user_error else RuntimeError)(event.message)
            if event == _DONE:
                _next_task(worker, tasks, busy)
            else:
                yield event


def _next_task(worker: _Worker, tasks: list[Any], busy: dict[Connection, _Worker]) -> None:
    if not tasks:
        busy.pop(worker.connection, None)
        return
    busy[worker.connection] = worker
    try:
        worker.connection.send(tasks.pop())
    except OSError as error:
        raise _killed(worker) from error


def _killed(worker: _Worker) -> UserError:
    worker.process.join(_CLOSING_SECONDS)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
    return UserError(
        f"a worker process {how}; if memory ran out, use fewer --workers. What is finished is "
        "kept: the same command goes on from there"
    )


def _serve(connection: Connection, setup: Callable[[], Work]) -> None:
    """The loop of a worker process, until the other end of the connection is closed."""
    try:
        work = setup()
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
