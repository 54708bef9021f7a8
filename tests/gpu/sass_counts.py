"""Counts what a kernel executes for one turn of its main loop, from its machine code.

    python tests/gpu/sass_counts.py OBJECT_FILE [PATTERN]

The main loop is the one with most instructions of the tensor cores, or else the longest. Its usual
turn is the shortest way around it that takes all of these and all copies to shared memory: where a
branch leads to a mask or to the search for another block, that is the way without. A loop inside it
counts as often as `--inner` says.
"""

from __future__ import annotations

import argparse
import heapq
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
# A guarded call whose return is never taken leaves a loop.
_JUMPS = ("BRA", "CALL.REL.NOINC")
# By prefix, the first that fits.
KINDS = (
    ("HMMA", "mma"),
    ("HGMMA", "mma"),
    ("LDSM", "ldmatrix"),
    ("LDGSTS", "cp.async"),
    ("LDS", "shared load"),
    ("STS", "shared store"),
    ("LDG", "global load"),
    ("STG", "global store"),
    ("RED", "reduction"),
    ("MUFU", "special"),
    ("FMNMX", "integer"),  # of the same unit
    ("FSEL", "integer"),
    ("FSETP", "integer"),
    ("F2FP", "convert"),
    ("F", "float32"),
    ("BAR", "barrier"),
    ("SHFL", "shuffle"),
)


@dataclass
class Block:
    """Instructions that run one after the other."""

    start: int
    opcodes: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    @property
    def is_needed(self) -> bool:
        return any(opcode.startswith(("HMMA", "HGMMA", "LDGSTS")) for opcode in self.opcodes)


def kind(opcode: str) -> str:
    return next((name for prefix, name in KINDS if opcode.startswith(prefix)), "integer")


def basic_blocks(code: str) -> dict[int, Block]:
    """By address of the first instruction."""
    lines = [(int(at, 16), guard, op, rest) for at, guard, op, rest in _INSTRUCTION.findall(code)]
    targets = {int(t, 16) for _, _, op, rest in lines if op in _JUMPS for t in _target(rest)}
    blocks: dict[int, Block] = {}
    block = None
    for (at, guard, op, rest), following in zip(lines, [*(each[0] for each in lines[1:]), None]):
        if block is None or at in targets:
            if block is not None and at not in block.next:
                block.next.append(at)
            block = blocks[at] = Block(at)
        block.opcodes.append(op)
        if op in _JUMPS or op in ("EXIT", "RET"):
            block.next += [int(t, 16) for t in _target(rest)] if op in _JUMPS else []
            is_conditional = guard or re.match(r"U?P\d", rest)
            if is_conditional and following is not None:
                block.next.append(following)
            block = None
    return blocks


def _target(operands: str) -> list[str]:
    return re.findall(r"0x([0-9a-f]+)", operands)[-1:]


def _way(blocks: dict[int, Block], start: int, ends: set[int]) -> list[int]:
    """The blocks after `start`, on the way with the fewest instructions, up to one of `ends`."""
    queue: list[tuple[int, tuple[int, ...]]] = [(0, (start,))]
    seen = set()
    while queue:
        length, way = heapq.heappop(queue)
        if way[-1] in ends and len(way) > 1:
            return list(way[1:])
        for step in blocks[way[-1]].next:
            if step in blocks and step not in seen:
                seen.add(step)
                heapq.heappush(queue, (length + len(blocks[step].opcodes), (*way, step)))
    raise ValueError(f"no way from {start:#x} to {sorted(map(hex, ends))}")


def _loops(blocks: dict[int, Block]) -> list[tuple[int, int, int, int]]:
    """Of each way back: instructions of tensor cores and all inside, first and last address."""
    found = []
    for start in blocks:
        for end in blocks[start].next:
            if end <= start:
                inside = [op for at, b in blocks.items() if end <= at <= start for op in b.opcodes]
                mma = sum(kind(op) == "mma" for op in inside)
                found.append((mma, len(inside), end, start))
    return found


def counts(code: str, inner: int = 1) -> Counter[str]:
    """Instructions of a usual turn by kind, and `all`; `inner`: turns of a loop inside it."""
    blocks = basic_blocks(code)
    loops = _loops(blocks)
    mma, _, first, last = max(loops)
    left = {at for at in blocks if first <= at <= last and blocks[at].is_needed} - {first}
    way = [first]
    while left:
        way += _way(blocks, way[-1], left)
        left -= set(way)
    way += _way(blocks, way[-1], {first})[:-1]
    inside = [(a, b) for n, _, a, b in loops if first <= a and b <= last and 0 < n < mma]
    total: Counter[str] = Counter()
    for at in set(way):
        times = inner if any(a <= at <= b for a, b in inside) else 1
        for opcode in blocks[at].opcodes:
            total[kind(opcode)] += times
            total["all"] += times
    return total


def kernels(object_file: str) -> Iterator[tuple[str, str]]:
    command = ["cuobjdump", "-sass", object_file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, code = part.partition("\n")
        yield name, code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("object_file")
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--inner", type=int, default=1)
    arguments = parser.parse_args()
    for name, code in kernels(arguments.object_file):
        if re.search(arguments.pattern, name):
            found = counts(code, arguments.inner)
            print(name, *(f"{k} {v}" for k, v in sorted(found.items())), sep="\n  ")


if __name__ == "__main__":
    main()
