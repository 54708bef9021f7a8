"""Markdown tables."""

from __future__ import annotations

from pypkg.console.markdown import table


def test_numbers_are_aligned_to_the_right() -> None:
    assert table(["name", "ms"], [["a", "1.25"]], text_columns=1, padded=False) == [
        "| name | ms |",
        "| --- | --: |",
        "| a | 1.25 |",
    ]


def test_a_padded_table_has_columns_of_one_width() -> None:
    assert table(["name", "ms"], [["a", "1.25"]], text_columns=1) == [
        "| name |   ms |",
        "| ---- | ---: |",
        "| a    | 1.25 |",
    ]


def test_columns_are_text_by_default() -> None:
    assert table(["a", "b"], [], padded=False) == ["| a | b |", "| --- | --- |"]
