"""Batches: order, ranks, resuming, the thread behind them, and ids outside of the vocabulary."""

from __future__ import annotations

import atexit
import itertools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import counting_documents

from pypkg.data import (
    IGNORED_LABEL,
    BatchLoader,
    Packing,
    build_train_valid_test_datasets,
    check_vocabulary,
)
from pypkg.data.loading.prefetch import TimedIterator, prefetch, prefetch_in_turn
from pypkg.errors import UserError


@pytest.fixture
def dataset(make_corpus):
    prefix = make_corpus(counting_documents([11, 0, 23, 7, 40, 5, 30]))
    return build_train_valid_test_datasets([prefix], "1", 4, (60, 0, 0), 3)[0]


def texts(batches) -> list[list[int]]:
    """The samples again, one row each."""
    return [
        row
        for batch in batches
        for row in np.c_[batch["input_ids"], batch["labels"][:, -1]].tolist()
    ]


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 100])
def test_batches_are_the_samples_in_order(dataset, threads):
    loader = BatchLoader(dataset, 3, threads=threads)
    batches = list(loader)
    assert len(batches) == len(loader) == len(dataset) // 3
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        assert set(batch) == {"input_ids", "labels"}
        assert ids.dtype == labels.dtype == np.int64
        assert ids.shape == labels.shape == (3, 4)
        assert ids.flags.c_contiguous and labels.flags.c_contiguous
        assert ids[:, 1:].tolist() == labels[:, :-1].tolist()
    expected = [dataset[i]["text"].tolist() for i in range(len(dataset) // 3 * 3)]
    assert texts(batches) == expected


@pytest.mark.parametrize(("batch_size", "ranks"), [(2, 3), (1, 4), (5, 2)])
@pytest.mark.parametrize("consumed", [0, 7])
def test_ranks_share_each_global_batch(dataset, batch_size, ranks, consumed):
    loaders = [
        BatchLoader(
            dataset, batch_size, consumed, data_parallel_rank=rank, data_parallel_size=ranks
        )
        for rank in range(ranks)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    together = [text for batches in zip(*loaders) for text in texts(batches)]
    whole = (len(dataset) - consumed) // (batch_size * ranks) * batch_size * ranks
    expected = [dataset[i]["text"].tolist() for i in range(consumed, consumed + whole)]
    assert together == expected


def test_resuming_at_every_position(dataset):
    whole = list(BatchLoader(dataset, 2))
    for batches in range(len(whole) + 1):
        rest = list(BatchLoader(dataset, 2, consumed_samples=2 * batches))
        assert texts(rest) == texts(whole[batches:])


def test_position_behind_the_end(dataset):
    assert list(BatchLoader(dataset, 1, consumed_samples=len(dataset))) == []
    for position in (-1, len(dataset) + 1):
        with pytest.raises(UserError, match=f"data position, {position} samples"):
            BatchLoader(dataset, 1, consumed_samples=position)


def test_id_outside_of_the_vocabulary(make_corpus):
    documents = [np.zeros(50), np.arange(50), np.zeros(50)]
    documents[1][30] = 700
    prefix = make_corpus(documents)
    for data_prefix in ([prefix], ["1", prefix]):
        dataset = build_train_valid_test_datasets(data_prefix, "1", 8, (10, 0, 0), 0)[0]
        for check in (
            lambda d=dataset: check_vocabulary(d, 700),
            lambda d=dataset: list(BatchLoader(d, 2, vocab_size=700)),
        ):
            with pytest.raises(UserError, match=r"corpus\.bin: document 1 .* id 700; .* is 700"):
                check()
        check_vocabulary(dataset, 701)
        assert len(list(BatchLoader(dataset, 2, vocab_size=701))) > 3


@pytest.mark.parametrize(
    ("dtype", "token", "shown"), [(np.int32, -1, "-1"), (np.float32, np.nan, "nan|-1")]
)
def test_numbers_that_are_no_ids(make_corpus, dtype, token, shown):
    prefix = make_corpus([[1, 2, 3, 4], [5, token, 6]], dtype=dtype)
    dataset = build_train_valid_test_datasets([prefix], "1", 2, (3, 0, 0), 0)[0]
    with pytest.raises(UserError, match=f"document 1 holds the token id ({shown});"):
        check_vocabulary(dataset, 100)
    with pytest.raises(UserError, match="document 1 holds the token id -1;"):
        list(BatchLoader(dataset, 1, vocab_size=100))


def failing_after(items: int):
    yield from range(items)
    raise UserError("broken")


def new_threads(before: list[threading.Thread]) -> list[threading.Thread]:
    """Those that have started since; threads of earlier tests may end at any time."""
    return [each for each in threading.enumerate() if each not in before]


def wait_for_new_threads(before: list[threading.Thread]) -> None:
    deadline = time.monotonic() + 10
    while new_threads(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not new_threads(before)


def test_prefetch_hands_on_exceptions_after_the_items():
    threads = threading.enumerate()
    items = prefetch(failing_after(3), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="broken"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    wait_for_new_threads(threads)


def test_prefetch_stays_within_its_depth():
    made = []
    items = prefetch((made.append(i) or i for i in itertools.count()), 3)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) == 5  # one taken, three waiting, one in hand
    items.close()


@pytest.mark.parametrize("end", ["close", "forget"])
def test_prefetch_thread_ends_with_its_consumer(end):
    threads = threading.enumerate()
    items = prefetch(itertools.count(), 2)
    next(items)
    assert len(new_threads(threads)) == 1
    if end == "close":
        items.close()
    else:
        del items
    wait_for_new_threads(threads)


@pytest.mark.parametrize("has_started", [False, True])
def test_ctrl_c_while_the_prefetch_thread_starts(monkeypatch, has_started):
    threads, start = threading.enumerate(), threading.Thread.start
    at_exit = []

    def interrupted(thread: threading.Thread) -> None:
        if has_started:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr(atexit, "register", at_exit.append)
    items = prefetch(itertools.count(), 2)
    with pytest.raises(KeyboardInterrupt):
        next(items)
    for function in at_exit:
        function()
    wait_for_new_threads(threads)


def test_turns_hand_on_items_in_order_and_exceptions_after_them():
    threads = threading.enumerate()
    items = prefetch_in_turn([iter(range(0, 9, 3)), failing_after(2), iter(range(2, 9, 3))], 6)
    assert [next(items) for _ in range(7)] == [0, 0, 2, 3, 1, 5, 6]
    with pytest.raises(UserError, match="broken"):
        next(items)
    wait_for_new_threads(threads)


@pytest.mark.parametrize("end", ["close", "forget", "exhaust"])
def test_threads_of_turns_end_with_their_consumer(end):
    threads = threading.enumerate()
    items = prefetch_in_turn([itertools.count(), itertools.count(), iter([0, 1])], 3)
    assert [next(items) for _ in range(3)] == [0, 0, 0]
    assert len(new_threads(threads)) == 3
    if end == "close":
        items.close()
    elif end == "exhaust":
        assert list(items) == [1, 1, 1, 2, 2]
    else:
        del items
    wait_for_new_threads(threads)


def test_waiting_is_measured():
    def slow():
        for item in range(3):
            time.sleep(0.05)
            yield item

    timed = TimedIterator(slow())
    assert next(timed) == 0
    assert 0.04 < timed.seconds_per_item() < 0.5
    time.sleep(0.1)  # the consumer's own time
    assert list(timed) == [1, 2]
    assert 0.04 < timed.seconds_per_item() < 0.1
    assert timed.seconds_per_item() == 0.0


@pytest.mark.parametrize("threads", [0, 2])
def test_packed_batches_follow_the_documents_of_the_file(make_corpus, threads):
    """Tokens that count on belong to one document, whatever they are: there is no end token."""
    sizes = [11, 0, 23, 7, 1, 1, 40, 5, 30]
    prefix = make_corpus(counting_documents(sizes))
    dataset = build_train_valid_test_datasets([prefix], "1", 16, (30, 0, 0), 3)[0]
    firsts = {int(document[0]) for document in counting_documents(sizes) if len(document)}
    packing = Packing(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    plain = list(BatchLoader(dataset, 2, threads=0))
    packed = list(BatchLoader(dataset, 2, threads=threads, packing=packing))
    assert len(packed) == len(plain) > 10
    for batch, without in zip(packed, plain):
        assert set(batch) == {"input_ids", "labels", "document_starts", "position_ids"}
        assert batch["document_starts"].dtype == np.int32
        assert batch["position_ids"].dtype == batch["labels"].dtype == np.int64
        assert all(array.flags.c_contiguous for array in batch.values())
        assert (batch["input_ids"] == without["input_ids"]).all()
        for row in range(2):
            start = 0
            for place, token in enumerate(batch["input_ids"][row].tolist()):
                start = place if token in firsts else start
                assert batch["document_starts"][row, place] == start
                assert batch["position_ids"][row, place] == place - start
                label = without["labels"][row, place]
                expected = IGNORED_LABEL if label in firsts else label
                assert batch["labels"][row, place] == expected
    assert all(
        set(batch) == {"input_ids", "labels"}
        for batch in BatchLoader(dataset, 2, packing=Packing(eod_mask_loss=True))
    )


CONSUMER = """
import sys, time
import numpy as np
from pypkg.data import BatchLoader, build_train_valid_test_datasets
dataset = build_train_valid_test_datasets([sys.argv[1]], "1", 4, (10**6, 0, 0), 3)[0]
try:
    batches = iter(BatchLoader(dataset, 2, threads=2))
    next(batches)
    print("ready", flush=True)
    if sys.argv[2] == "busy":
        for _ in batches:
            pass
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_ctrl_c(make_corpus, state):
    prefix = make_corpus(counting_documents([11, 23]))
    process = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, prefix, state],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "interrupted\n", "")


LEFT_OPEN = """
import sys, time
from pypkg.data import BatchLoader, build_train_valid_test_datasets
dataset = build_train_valid_test_datasets([sys.argv[1]], "1", 1 << 20, (64, 0, 0), 3)[0]
batches = iter(BatchLoader(dataset, 2, threads=4))
next(batches)

class SlowEnd:  # of the interpreter, so that every thread comes back from C++ during it
    def __del__(self, sleep=time.sleep):
        sleep(1)

slow_end = SlowEnd()
sys.exit(3)
"""


def test_a_loader_that_is_left_open_at_exit(make_corpus):
    """The threads are in C++ most of the time, where the end of the interpreter must not meet them.

    A thread that comes back from C++ to an interpreter that is being torn down aborts the process.
    """
    prefix = make_corpus([np.zeros(8)] * (1 << 17) + [np.zeros(1)])
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, prefix], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_nothing_of_data_imports_paddle():
    code = "import sys, pypkg.data, pypkg.preprocess; sys.exit('paddle' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
    )
