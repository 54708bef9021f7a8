"""The way from text to tokens."""

from __future__ import annotations

from pypkg.bench.report.quantities import median_and_quartiles
from pypkg.bench.report.result import Result
from pypkg.markdown import table

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
        "- `pypkg` is the whole command, start of Python and of the workers included, from the "
        "file to .bin/.idx on the disk. The clock of the others starts when their packages are "
        "imported",
        "- `tokenizers alone`: encode_batch_fast on texts in memory, with as many threads, and the "
        "ids as lists, which are thrown away; they take time that the third row leaves out",
        "- PaddleNLP: what create_pretraining_data.py does for each line, rebuilt (the script is "
        "no part of the wheel), with PaddleNLP's own tokenizer class and .bin/.idx builder. It "
        "wrote the same files, byte for byte. GPTTokenizer is what AutoTokenizer takes for GPT, in "
        "Python; Qwen2TokenizerFast reads tokenizer.json with the tokenizers library",
        "- `vs first`: time divided by that of the first row",
        "",
        *table(head, body, text_columns=1),
    ]
