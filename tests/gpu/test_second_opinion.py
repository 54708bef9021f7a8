"""The comparison of our attention with Paddle's, tried out on the CPU with the reference."""

from __future__ import annotations

from second_opinion import compare_attention

from pypkg import ops


def reference(q, k, v, mask):
    return ops.flash_attention_reference(q, k, v, mask)[0]


def test_equal_attention_agrees():
    rows = compare_attention(ops.flash_attention, reference, 40, (16,))
    assert len(rows) == 7 and all(row["passed"] for row in rows), rows
    assert all(row["dq"] > 0 for row in rows)


def test_other_attention_is_noticed():
    """One key more in a window, the mask left out, NaN, an exception."""

    def wider(q, k, v, mask):
        window = mask.window and mask.window + 1
        other = ops.AttentionMask(mask.causal, window, mask.prefix_lengths, mask.document_starts)
        return reference(q, k, v, other)

    def passed(second) -> list[bool]:
        rows = compare_attention(ops.flash_attention, second, 40, (16,))
        return [row["passed"] for row in rows]

    assert passed(wider) == [True, True, False, True, True, False, True]
    assert passed(lambda q, k, v, _: reference(q, k, v, None)) == [True] + [False] * 6
    assert not any(passed(lambda *given: reference(*given) * float("nan")))
    [row, *_] = compare_attention(ops.flash_attention, lambda *_: 1 / 0, 40, (16,))
    assert row["error"].startswith("ZeroDivisionError")
