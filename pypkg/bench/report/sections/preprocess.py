"""Tokenization of text."""

from __future__ import annotations

from pypkg.bench.report.quantities import median_and_quartiles
from pypkg.bench.report.result import Result
from pypkg.console.markdown import table

TITLE = "Text to tokens"


def render(result: Result) -> list[str]:
    rows = result["rows"]
    ours = rows[0]["median"]
    body = [
        [
            row["baseline"],
            *median_and_quartiles(row),
            f"{row['text_bytes'] / 1e6 / row['median']:.2f}",
            f"{row['tokens'] / 1e6 / row['median']:.2f}",
            f"{row['median'] / ours:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['cpu_seconds'] / rows[0]['cpu_seconds']:.2f}",
        ]
        for row in rows
    ]
    head = ["baseline", "s", "quartiles", "MB/s", "M tokens/s", "vs first", "CPU s", "vs first"]
    return [
        f"- {result['workload']}",
        "- `pypkg` is timed as a whole command, from the start of Python and its workers to "
        ".bin/.idx on the disk. The others are timed after their packages are imported",
        "- `tokenizers alone`: encode_batch_fast on texts in memory, with as many threads, and the "
        "conversion of ids to lists, which the third row leaves out",
        "- PaddleNLP: the loop of create_pretraining_data.py, rewritten because the wheel lacks "
        "the script, with PaddleNLP's tokenizer class and .bin/.idx builder. It writes the same "
        "files, byte for byte. AutoTokenizer chooses GPTTokenizer, written in Python, for GPT; "
        "Qwen2TokenizerFast reads tokenizer.json with the tokenizers library",
        "- `vs first`: time divided by that of the first row",
        "",
        *table(head, body, text_columns=1),
    ]
