"""The settings of a run beside their defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pypkg.config import Settings
from pypkg.report.document import SettingRow

# Settings from which defaults of others are derived (``Settings.__post_init__``).
_SOURCES_OF_DEFAULTS = (
    "model_name_or_path",
    "max_steps",
    "do_eval",
    "logging_steps",
    "max_evaluate_steps",
)


def setting_rows(saved: Mapping[str, Any]) -> list[SettingRow]:
    """Each setting that a run saved, sorted by name.

    A default that is derived from another setting (``decay_steps`` from ``max_steps``) is derived
    from the run's value of that setting. A setting that this version does not know counts as
    changed.

    Args:
        saved: settings by name, as ``Settings.to_json`` writes them.
    """
    defaults = _defaults(saved)
    rows = []
    for name, value in sorted(saved.items()):
        default = defaults.get(name, _UNKNOWN)
        is_changed = default is _UNKNOWN or value != default
        rows.append(SettingRow(name, _text(value), _text(default), is_changed))
    return rows


_UNKNOWN = object()


def _defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(Settings().to_json())
    sources = {name: saved[name] for name in _SOURCES_OF_DEFAULTS if name in saved}
    try:
        derived = json.loads(Settings(**sources).to_json())
    except (TypeError, ValueError):  # values of another version
        return plain
    return derived | {name: plain[name] for name in sources}


def _text(value: Any) -> str:
    if value is _UNKNOWN:
        return "not a setting of this version"
    return value if isinstance(value, str) else json.dumps(value)
