"""The summary of a run: figures, a plot of the loss, a sample of text."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pypkg.data.tokenizers.load import Tokenizer
from pypkg.files import write_file
from pypkg.generation.text import complete
from pypkg.models.building import Model
from pypkg.models.sampling import Sampling
from pypkg.training.reporting.outcome import Outcome, perplexity
from pypkg.training.reporting.reporters import read_metrics


@dataclass
class Summary:
    outcome: Outcome
    checkpoint: Path | None
    loss_curve: Path | None
    sample: str | None
    data: list[dict[str, object]]
    test_loss: float | None = None
    events: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for summary.json; losses in nats per token."""
        outcome = self.outcome
        eval_loss = outcome.eval_loss
        return {
            "global_step": outcome.state.global_step,
            "consumed_tokens": outcome.state.consumed_tokens,
            "initial_loss": outcome.state.initial_loss,
            "final_loss": outcome.final_loss,
            "eval_loss": eval_loss,
            "eval_perplexity": None if eval_loss is None else perplexity(eval_loss),
            "test_loss": self.test_loss,
            "tokens_per_second_per_device": outcome.tokens_per_second,
            "mfu": outcome.mfu,
            "peak_memory_gib": outcome.peak_memory / 2**30,
            "checkpoint": _text(self.checkpoint),
            "loss_curve": _text(self.loss_curve),
            "sample": self.sample,
            "data": self.data,
            "events": self.events,
        }

    def text(self) -> str:
        """The summary as text for the terminal."""
        values = self.as_dict()
        rows = [
            ("steps", f"{values['global_step']:,} ({values['consumed_tokens']:,} tokens)"),
            ("training loss", f"{_loss(values['initial_loss'])} -> {_loss(values['final_loss'])}"),
        ]
        if values["eval_loss"] is not None:
            rows.append(
                (
                    "validation loss",
                    f"{_loss(values['eval_loss'])} (perplexity {values['eval_perplexity']:.2f})",
                )
            )
        if self.test_loss is not None:
            rows.append(
                (
                    "test loss",
                    f"{_loss(self.test_loss)} (perplexity {perplexity(self.test_loss):.2f})",
                )
            )
        if values["tokens_per_second_per_device"] is not None:
            mfu = "" if values["mfu"] is None else f", MFU {values['mfu']:.1%}"
            rows.append(("speed", f"{values['tokens_per_second_per_device']:,.0f} tokens/s{mfu}"))
        rows.append(("peak memory", f"{values['peak_memory_gib']:.2f} GiB"))
        rows.append(("checkpoint", values["checkpoint"] or "none (save_strategy is no)"))
        rows.append(
            ("loss curve", values["loss_curve"] or 'not drawn: pip install ".[plot]" draws it')
        )
        rows += [("data", _usage(row)) for row in self.data]
        if self.events:
            told = ", ".join(f"{count} {name}" for name, count in self.events.items())
            rows.append(("events", f"{told} (ledger.jsonl)"))
        width = max(len(name) for name, _ in rows)
        lines = ["summary", *(f"  {name:<{width}}  {value}" for name, value in rows)]
        if self.sample is not None:
            lines += ["  a sample that the model wrote:", _indented(self.sample)]
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        """Replaces ``file`` by the figures as JSON, in one step.

        Raises:
            UserError: the file cannot be written.
        """
        write_file(file, (json.dumps(self.as_dict(), indent=2) + "\n").encode())


def write_sample(model: Model, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int) -> str:
    """``prompt`` and ``tokens`` more tokens, sampled with top-k 40 at temperature 0.8.

    The ends of documents do not end it. All ranks have to call it.
    """
    model.eval()
    sampling = Sampling(temperature=0.8, top_k=40, seed=seed)
    (written,) = complete(model, tokenizer, [prompt], tokens, sampling)
    return prompt + written.text


def draw_loss_curve(metrics_file: Path, picture: Path) -> Path | None:
    """Training and validation loss over steps, as a PNG; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    rows = read_metrics(metrics_file)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(row["global_step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set_xlabel("step")
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:  # a run that resumes after its last step logs no loss
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    write_file(picture, png.getbuffer())
    return picture


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _usage(row: dict[str, object]) -> str:
    return (
        f"{row['corpus']}: {row['samples']:,} samples, {row['tokens']:,} tokens, "
        f"{row['epochs']:.2f} epochs"
    )


def _loss(value: object) -> str:
    return "-" if value is None else f"{value:.4f}"


def _indented(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.splitlines())
