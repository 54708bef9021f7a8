"""One rank of test_gloo.py: what the adapter adds to gloo, against NumPy.

Every rank draws the arrays of all ranks and knows the result of each operation.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.distributed as dist
from distributed_testing import report
from paddle.distributed.fleet.layers.mpu import mp_ops

from pypkg.parallel import mesh

SHAPE = (4, 6)
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64")


def arrays(size: int, seed: int) -> list[np.ndarray]:
    """Small whole numbers, whose sums every dtype holds exactly; one array for each rank."""
    generator = np.random.default_rng(seed)
    return [generator.integers(-8, 9, SHAPE) for _ in range(size)]


def tensor(array: np.ndarray, dtype: str = "float32") -> paddle.Tensor:
    return paddle.to_tensor(array.astype("float64")).astype(dtype)


def same(found: paddle.Tensor, expected: np.ndarray) -> bool:
    return np.array_equal(found.astype("float64").numpy(), expected)


def collectives(group: dist.communication.group.Group, dtype: str) -> dict[str, bool]:
    rank, size = group.rank, group.nranks
    given = arrays(size, seed=size)
    own, total = given[rank], sum(given)
    found = {}

    x = tensor(own, dtype)
    dist.all_reduce(x, group=group)
    found["all_reduce"] = same(x, total)

    x = tensor(own, dtype)
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    found["all_reduce max"] = same(x, np.max(given, axis=0))

    x = tensor(own, dtype)
    dist.reduce(x, dst=group.ranks[-1], group=group)
    found["reduce"] = same(x, total if rank == size - 1 else own)

    x = tensor(own, dtype)
    dist.broadcast(x, src=group.ranks[1], group=group)
    found["broadcast"] = same(x, given[1])

    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, tensor(own, dtype), group=group)
    found["all_gather"] = all(same(part, each) for part, each in zip(parts, given, strict=True))

    joined = paddle.empty([size * SHAPE[0], SHAPE[1]], dtype)
    dist.stream.all_gather(joined, tensor(own, dtype), group=group)
    found["all_gather into one"] = same(joined, np.concatenate(given))

    wide = [np.concatenate([each + step for step in range(size)]) for each in given]
    out = paddle.empty(list(SHAPE), dtype)
    dist.stream.reduce_scatter(out, tensor(wide[rank], dtype), group=group)
    found["reduce_scatter"] = same(out, total + size * rank)

    out = paddle.empty([size * SHAPE[0], SHAPE[1]], dtype)
    dist.alltoall_single(out, tensor(wide[rank], dtype), group=group)
    found["all_to_all"] = same(out, np.concatenate([each + rank for each in given]))

    # Rank r sends (r + i) % 3 rows to rank i, sometimes none.
    rows = [[(r + i) % 3 for i in range(size)] for r in range(size)]
    sent = [np.concatenate([each] * size)[: sum(n)] for each, n in zip(given, rows, strict=True)]
    received = [n[rank] for n in rows]
    firsts = [sum(n[:rank]) for n in rows]
    expected = [each[f : f + n] for each, f, n in zip(sent, firsts, received, strict=True)]
    out = paddle.empty([sum(received), SHAPE[1]], dtype)
    own_rows = tensor(sent[rank], dtype)
    dist.alltoall_single(out, own_rows, rows[rank], received, group=group)
    found["all_to_all of unequal parts"] = same(out, np.concatenate(expected))
    return found


def average(group: dist.communication.group.Group) -> bool:
    given = arrays(group.nranks, seed=1)
    x = tensor(given[group.rank])
    dist.all_reduce(x, op=dist.ReduceOp.AVG, group=group)
    return same(x, np.mean(given, axis=0))


def messages(group: dist.communication.group.Group) -> bool:
    """Everyone sends to everyone before anyone receives; two to each, in order."""
    rank, size = group.rank, group.nranks
    for number in range(2):
        for other in range(size):
            if other != rank:
                value = paddle.full([3], 100 * number + 10 * rank + other, dtype="bfloat16")
                dist.send(value, dst=group.ranks[other], group=group)
    found = True
    for other in range(size):
        for number in range(2):
            if other != rank:
                value = paddle.zeros([3], dtype="bfloat16")
                dist.recv(value, src=group.ranks[other], group=group)
                found &= same(value, np.full(3, 100 * number + 10 * other + rank))
    return found


def posted_out_of_order(group: dist.communication.group.Group) -> bool:
    """Two receives from the same rank get its messages in the order in which they were posted."""
    rank, size = group.rank, group.nranks
    after, before = (rank + 1) % size, (rank - 1) % size
    received = [paddle.zeros([2]), paddle.zeros([2])]
    tasks = [dist.irecv(each, src=group.ranks[before], group=group) for each in received]
    for value in (1.0, 2.0):
        dist.isend(paddle.full([2], value + 10 * rank), dst=group.ranks[after], group=group)
    tasks[1].wait()
    tasks[0].wait()
    return all(same(each, np.full(2, n + 10 * before)) for n, each in zip((1, 2), received))


def tensor_parallel_operators(group: dist.communication.group.Group) -> dict[str, bool]:
    """In float64, forward and backward."""
    rank, size = group.rank, group.nranks
    given = arrays(size, seed=3)
    x = tensor(given[rank], "float64")
    x.stop_gradient = False
    joined = mp_ops._c_concat(x, group=group)
    weights = np.arange(joined.size).reshape(joined.shape)
    (joined * tensor(weights, "float64")).sum().backward()
    columns = slice(rank * SHAPE[1], (rank + 1) * SHAPE[1])
    found = {
        "concat": same(joined, np.concatenate(given, axis=-1)),
        "concat gradient": same(x.grad, weights[:, columns]),
    }
    whole = tensor(np.concatenate(given, axis=-1), "float64")
    found["split"] = same(mp_ops._c_split(whole, group=group), given[rank])

    table = tensor(given[rank], "float64")
    table.stop_gradient = False
    ids = paddle.to_tensor([0, SHAPE[0], 1, SHAPE[0] * size - 1, 1])
    rows = mp_ops._c_lookup_table(table, ids, start_index=rank * SHAPE[0], vocab_size=-1)
    rows.sum().backward()
    vocabulary = np.concatenate(given)
    own = [i for i in ids.tolist() if i // SHAPE[0] == rank]
    counts = np.bincount([i % SHAPE[0] for i in own], minlength=SHAPE[0])
    expected = np.stack([vocabulary[i] if i // SHAPE[0] == rank else 0 * own_row
                         for i, own_row in ((i, vocabulary[0]) for i in ids.tolist())])  # fmt: skip
    found["embedding"] = same(rows, expected)
    found["embedding gradient"] = same(table.grad, np.repeat(counts[:, None], SHAPE[1], axis=1))
    return found


def main() -> None:
    processes = mesh.launched_processes()
    degrees = mesh.Degrees(tensor=2, data=processes // 2)
    current = mesh.initialize(degrees)
    groups = {"world": dist.get_group(0), "tensor": current.tensor, "data": current.data}
    results = {}
    for name, group in groups.items():
        if group is None:
            continue
        for dtype in DTYPES:
            checks = collectives(group, dtype)
            results |= {f"{name}, {dtype}, {check}": bool(ok) for check, ok in checks.items()}
        results[f"{name}, average"] = average(group)
        results[f"{name}, messages"] = messages(group)
        results[f"{name}, order of messages"] = posted_out_of_order(group)
    checks = tensor_parallel_operators(current.tensor)
    results |= {check: bool(ok) for check, ok in checks.items()}
    report(results)


if __name__ == "__main__":
    main()
