"""Chooses the attention of a run: pypkg's, Paddle's flash attention, or the reference."""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.device.attention_record import Timing, recorded_timings
from pypkg.device.capabilities import Capabilities
from pypkg.errors import UserError

_REFERENCE = "attention stores [batch, heads, sequence, sequence]"


@dataclass(frozen=True, kw_only=True)
class AttentionNeeds:
    """The requirements of a model on attention."""

    dtype: str  # "float32", "bfloat16" or "float16"
    head_dim: int
    alibi: bool = False
    softcap: bool = False

    def paddle_lacks(self) -> str | None:
        """The requirements that Paddle's flash attention does not meet, as text; None if none."""
        lacks = {
            "float32": self.dtype == "float32",
            "ALiBi": self.alibi,
            "soft cap": self.softcap,
            f"head_dim of {self.head_dim}": self.head_dim > 256,
        }
        missing = [f"no {name}" for name, needed in lacks.items() if needed]
        return f"Paddle's flash attention has {', '.join(missing)}" if missing else None


@dataclass(frozen=True)
class AttentionChoice:
    """The attention of a run.

    Attributes:
        reason: for the log.
        kernel: the set of pypkg's GPU kernels that is fastest according to the record, for
            PYPKG_FLASH_ATTENTION; None: the variable is not set.
    """

    backend: str  # "pypkg", "paddle" or "reference"
    reason: str
    kernel: str | None = None

    def describe(self) -> str:
        """One line for the log."""
        return f"attention: {self.backend} ({self.reason})"


def choose_attention(
    asked: str, needs: AttentionNeeds, capabilities: Capabilities
) -> AttentionChoice:
    """Chooses the attention for ``asked``: "auto", "flash", "pypkg", "paddle" or "reference".

    On a CPU, auto is pypkg's attention. On a GPU it is the first that applies: pypkg's, if the
    record says that its kernels passed their checks on this GPU and were faster; Paddle's; pypkg's
    without a record; the reference. flash is auto without the reference.

    Raises:
        UserError: the attention that was asked for by name cannot run, or the record cannot be
            read.
    """
    own_obstacle = capabilities.own_attention_obstacle()
    paddle_obstacle = capabilities.paddle_attention_obstacle() or needs.paddle_lacks()
    if asked == "reference":
        return AttentionChoice("reference", f"asked for; {_REFERENCE}")
    obstacle = {"pypkg": own_obstacle, "paddle": paddle_obstacle}.get(asked)
    if obstacle:
        raise UserError(
            f"attention_backend is {asked!r}, but {obstacle}; set it to 'auto', or leave it out"
        )
    timing = None
    if capabilities.device == "gpu" and asked != "paddle" and not own_obstacle:
        recorded = recorded_timings(capabilities.device_name, capabilities.kernel_sources)
        timing = recorded.get(needs.head_dim)
    kernel = timing.kernel if timing else None
    if asked == "pypkg":
        return AttentionChoice("pypkg", f"asked for; {_known(timing)}", kernel)
    if asked == "paddle":
        return AttentionChoice("paddle", "asked for")
    if own_obstacle is None and capabilities.device == "cpu":
        return AttentionChoice("pypkg", "CPU kernels")
    if own_obstacle is None and timing and timing.faster:
        return AttentionChoice("pypkg", _known(timing), kernel)
    if paddle_obstacle is None:
        return AttentionChoice("paddle", own_obstacle or _known(timing))
    if own_obstacle is None:
        return AttentionChoice("pypkg", f"{paddle_obstacle}; {_known(timing)}", kernel)
    if asked == "flash":
        raise UserError(
            f"use_flash_attention is true, but {own_obstacle}, and {paddle_obstacle}; set it to "
            "false, or leave it out"
        )
    return AttentionChoice("reference", f"{own_obstacle}; {paddle_obstacle}; {_REFERENCE}")


def _known(timing: Timing | None) -> str:
    if timing is None:
        return "no record that our kernels passed `make gpu-check` on this GPU"
    return (
        f"`make gpu-check` measured {timing.milliseconds:.3g} ms for ours and "
        f"{timing.other_milliseconds:.3g} ms for {timing.other}"
    )
