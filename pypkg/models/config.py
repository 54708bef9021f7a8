"""The shape of a model: one dataclass, in which every difference between families is a field.

Nothing here imports Paddle, so that planning and parameter counts run anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypkg.errors import UserError

# Rope scalings: keys that must be there, keys that may be. The formulas are in positions.py.
_ROPE_SCALING_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset(
            {
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            }
        ),
        frozenset(),
    ),
    "yarn": (
        frozenset(),
        frozenset(
            {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}
# What files carry beside these: told elsewhere, or read by no formula.
_ROPE_SCALING_IGNORED = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_FLAGS = ("qkv_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model.

    ``num_key_value_heads`` defaults to ``num_attention_heads`` and ``head_dim`` to
    ``hidden_size / num_attention_heads``. ``rope_scaling`` is None or a dict with ``rope_type``
    one of linear, dynamic, llama3, yarn and the parameters of that type under the names that
    Hugging Face files use.

    Raises:
        UserError: a value is of the wrong type, or values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # set in __post_init__
    head_dim: int = None  # type: ignore[assignment]  # set in __post_init__
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"  # whose file format the model is read from and written to

    def __post_init__(self) -> None:
        _check_size("hidden_size", self.hidden_size)
        _check_size("num_attention_heads", self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size ({self.hidden_size}) is not divisible by num_attention_heads "
                    f"({self.num_attention_heads}); change one of them, or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_types(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) is not divisible by "
                f"num_key_value_heads ({self.num_key_value_heads}); use a divisor of "
                f"{self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim ({self.head_dim}) is odd, but rotary position embedding turns pairs of "
                f"dimensions; with hidden_size {self.hidden_size} and num_attention_heads "
                f"{self.num_attention_heads}, choose sizes that make it even"
            )
        scaling = _normalised_rope_scaling(self.rope_scaling, self.max_position_embeddings)
        object.__setattr__(self, "rope_scaling", scaling)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together; that of the values is the same."""
        return self.num_key_value_heads * self.head_dim

    def replace(self, **overrides: Any) -> ModelConfig:
        """A copy with some fields changed.

        ``head_dim`` and ``num_key_value_heads`` follow a change of the sizes that they were
        derived from, unless they are given.

        Raises:
            UserError: an unknown field, or a result that makes no sense.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                raise UserError(f"{name!r} is not a field of ModelConfig{nearest(name, names)}")
        values = {name: getattr(self, name) for name in names}
        if self.query_size == self.hidden_size:
            values["head_dim"] = None
        if self.num_key_value_heads == self.num_attention_heads:
            values["num_key_value_heads"] = None
        return ModelConfig(**{**values, **overrides})

    def num_parameters(self) -> int:
        """Number of parameters: embedding, layers, final norm, and the head unless it is tied."""
        h, ffn = self.hidden_size, self.intermediate_size
        qkv = self.query_size + 2 * self.key_value_size
        attention = h * qkv + self.qkv_bias * qkv
        attention += self.query_size * h + self.attention_output_bias * h
        mlp = 3 * h * ffn + self.mlp_bias * (2 * ffn + h)
        norms = 2 * h
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * (attention + mlp + norms) + h + tables * self.vocab_size * h

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of one training step per token, forward and backward.

        6 N + 12 L h s (Chowdhery et al., 2022, appendix B): N is ``num_parameters()``, all of
        them, the embedding table included although looking it up costs nothing; L is the number
        of layers, h the width of the query heads together and s ``seq_length``. Attention is
        counted in full, without halving it for the causal mask, and recomputation is not counted.
        This is the convention of published model FLOPs utilisation, MFU = flops_per_token *
        tokens_per_second / peak_flops.
        """
        attention = 12 * self.num_hidden_layers * self.query_size * seq_length
        return float(6 * self.num_parameters() + attention)


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message about an unknown name: the closest known ones, if any."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(by_lower[match] for match in close)}?" if close else ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, unreadable, not JSON (with line and column), no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: it is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def rope_from_huggingface(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The fields ``rope_theta`` and ``rope_scaling`` of a config.json.

    transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 writes both into
    ``rope_parameters``.
    """
    scaling = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UserError(f"rope_scaling must be an object or null, found {scaling!r}")
    values = {key: value for key, value in {**keys, **scaling}.items() if value is not None}
    fraction = values.get("partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise UserError(f"partial_rotary_factor must be 1.0 for this model, found {fraction!r}")
    return {"rope_theta": values.get("rope_theta", 10000.0), "rope_scaling": dict(scaling)}


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a positive integer, found {value!r}")


def _check_types(config: ModelConfig) -> None:
    for name in _SIZES:
        _check_size(name, getattr(config, name))
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise UserError(f"{name} must be true or false, found {getattr(config, name)!r}")
    for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
        _check_positive_number(name, getattr(config, name))


def _check_positive_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{name} must be a positive number, found {value!r}")


def _normalised_rope_scaling(scaling: Any, max_positions: int) -> dict[str, Any] | None:
    """``scaling`` with its type under ``rope_type`` and only keys that a formula reads."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise UserError(f"rope_scaling must be an object or null, found {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_SCALING_KEYS:
        known = ", ".join(_ROPE_SCALING_KEYS)
        raise UserError(f"rope_scaling type {kind!r} is not supported; use one of {known}")
    required, optional = _ROPE_SCALING_KEYS[kind]
    values = {
        key: value
        for key, value in scaling.items()
        if key not in _ROPE_SCALING_IGNORED and value is not None
    }
    if kind in ("default", "linear", "dynamic"):  # saved with them at times, and not used by them
        values.pop("original_max_position_embeddings", None)
    if missing := sorted(required - set(values)):
        raise UserError(f"rope_scaling of type {kind} lacks {', '.join(missing)}")
    if unknown := sorted(set(values) - required - optional):
        raise UserError(
            f"rope_scaling of type {kind} does not know {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(required | optional))}"
        )
    if kind == "default":
        return None
    for key in sorted(set(values) - {"truncate"}):
        _check_positive_number(f"rope_scaling.{key}", values[key])
    if kind == "yarn":
        values.setdefault("original_max_position_embeddings", max_positions)
        values.setdefault("factor", max_positions / values["original_max_position_embeddings"])
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(
            f"rope_scaling.high_freq_factor ({values['high_freq_factor']}) must be above "
            f"low_freq_factor ({values['low_freq_factor']})"
        )
    return {"rope_type": kind, **values}
