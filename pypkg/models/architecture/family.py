"""``Family``: the config.json keys and the tensor names of a model family.

Nothing here imports Paddle.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.checks import check_num_parameters, check_size
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.config_keys import DROPOUTS, NEUTRAL, UNUSED
from pypkg.models.architecture.weight_map import WeightMap

logger = logging.getLogger("pypkg.models")

Keys = Mapping[str, Any]

# Token ids. Their keys in config.json have the same name in every family.
TOKEN_IDS = {name: name for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: how to read and write its config.json, and its weight map.

    Args:
        name: value of ``ModelConfig.model_type``.
        weight_map: returns the names and layouts of the tensors for a configuration.
        keys: field of ModelConfig -> key in config.json. If a key has several names, all are read
            and the first is written.
        model_type: value in config.json; empty: ``name``.
        architectures: class names in config.json; the first is written.
        auto_map: ``auto_map`` of config.json, for families whose repositories contain model code.
        distinctive_key: a key that distinguishes this family from others with the same
            ``model_type``.
        fields: constant fields of ModelConfig for which config.json has no key.
        fixed: keys that affect the model, with the only supported value. They are written.
        neutral: keys that affect the model, with the values that have no effect, besides null. They
            are not written.
        unused: keys that never have an effect.
        extensions: field of ModelConfig -> key that the original implementation does not read. The
            key is read with a warning, and written if its value is not the default.
        dropouts: keys of dropout probabilities. They are ignored, with a warning if one is not 0,
            and written as 0.
        reads: keys that ``read_more`` receives in addition to ``keys``.
        read_more: computes fields of ModelConfig from these keys.
        write_more: the inverse of ``read_more``.
    """

    name: str
    weight_map: Callable[[ModelConfig], WeightMap]
    keys: Mapping[str, str | tuple[str, ...]]
    model_type: str = ""
    architectures: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)
    distinctive_key: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    extensions: Mapping[str, str] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    read_more: Callable[[Keys], dict[str, Any]] = _nothing
    write_more: Callable[[ModelConfig], dict[str, Any]] = _nothing

    def recognises(self, keys: Keys) -> bool:
        """Whether the keys of a config.json belong to this family."""
        if self.distinctive_key and self.distinctive_key not in keys:
            return False
        architectures = keys.get("architectures") or []
        return keys.get("model_type") == (self.model_type or self.name) or any(
            each in self.architectures for each in architectures
        )

    def read_config(self, keys: Keys, allow_unknown_config: Collection[str] = ()) -> ModelConfig:
        """The configuration that a config.json describes.

        Args:
            keys: the object in config.json.
            allow_unknown_config: unknown keys to ignore instead of raising an error.

        Raises:
            UserError: a key is missing or unknown, or a value is invalid or not supported. The
                message names all keys that are unknown or not supported.
        """
        self._check_keys(keys, allow_unknown_config)
        if active := tuple(key for key in keys if self._is_dropout(key) and keys[key]):
            _log_dropout(self.name, active)
        values = dict(self.fields)
        for name, key in self.extensions.items():
            if keys.get(key) is not None:
                values[name] = keys[key]
                if keys[key] != _DEFAULTS[name]:
                    _log_extension(self.name, key)
        for name in self.keys:
            for key in self._names(name):
                if keys.get(key) is not None:
                    values[name] = keys[key]
                    break
        if values.get("num_hidden_layers") is not None:  # ``read_more`` may make such a list
            check_size("num_hidden_layers", values["num_hidden_layers"])
        read = {key: keys[key] for key in keys if key in self.known_keys()}
        try:
            values.update(self.read_more(read))
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"a {self.name} config.json holds a value of the wrong type or size, or lacks one: "
                f"{type(error).__name__} {error}"
            ) from error
        if missing := [name for name in _REQUIRED if values.get(name) is None]:
            written = [self.key(name) for name in missing]
            raise UserError(f"config.json lacks {', '.join(written)}")
        config = ModelConfig(model_type=self.name, **values)
        check_num_parameters(config.num_parameters())
        return config

    def known_keys(self) -> frozenset[str]:
        """The keys that this family reads."""
        named = (key for name in self.keys for key in self._names(name))
        return frozenset((*named, *self.extensions.values(), *self.reads))

    def _check_keys(self, keys: Keys, allowed: Collection[str]) -> None:
        """Raises UserError for keys that reading would ignore and that may change the model."""
        read, problems, unknown = self.known_keys(), [], []
        for key, value in keys.items():
            if key in self.fixed:
                # null counts as false, but not as a string or number.
                if value != self.fixed[key] and not (value is None and not self.fixed[key]):
                    problems.append(self._needs(key, value, (self.fixed[key],)))
            elif value is None or key in read or key in self.unused or self._is_dropout(key):
                continue
            elif key in self.neutral or key in NEUTRAL:
                values = self.neutral.get(key, NEUTRAL.get(key, ()))
                if value not in values:
                    problems.append(self._needs(key, value, values))
            elif key not in UNUSED and key not in allowed:
                unknown.append(key)
        for name in self.keys:
            given = {key: keys[key] for key in self._names(name) if keys.get(key) is not None}
            if len({repr(value) for value in given.values()}) > 1:
                listed = " and ".join(f"{key} {value!r}" for key, value in given.items())
                problems.append(f"{listed} are two values of the same key; keep the right one")
        if unknown:
            problems.append(
                f"a {self.name} model does not know {', '.join(unknown)}, which may change it. "
                f"Remove the key from config.json, or ignore it with --allow_unknown_config "
                f"{' '.join(unknown)} of pypkg pretrain and pypkg convert"
            )
        if problems:
            raise UserError("; ".join(problems))

    def _needs(self, key: str, value: Any, supported: tuple[Any, ...]) -> str:
        wanted = " or ".join(map(repr, supported)) or "null"
        return f"{key} is {value!r}; a {self.name} model needs {wanted}"

    def _is_dropout(self, key: str) -> bool:
        return key in DROPOUTS or key in self.dropouts

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The content of a config.json in the format of transformers 4, which version 5 reads too.

        Raises:
            UserError: a config.json of the family cannot express ``config``.
        """
        keys = {
            "model_type": self.model_type or self.name,
            **({"architectures": [self.architectures[0]]} if self.architectures else {}),
            **({"auto_map": dict(self.auto_map)} if self.auto_map else {}),
            **{self.key(name): getattr(config, name) for name in self.keys},
            **self.fixed,
            **dict.fromkeys(self.dropouts, 0.0),
            **self.write_more(config),
        }
        restored = self.read_config(keys)
        for name, key in self.extensions.items():
            value = getattr(config, name)
            if getattr(restored, name) != value:
                keys[key] = list(value) if isinstance(value, tuple) else value
        if lost := differing_fields(config, self.read_config(keys)):
            raise UserError(
                f"a {self.name} config.json cannot hold {', '.join(lost)} beside the other values; "
                "the model is not one that the original implementation has"
            )
        return keys

    def _names(self, name: str) -> tuple[str, ...]:
        """All names of the key for the field ``name``."""
        key = self.keys.get(name, name)
        return (key,) if isinstance(key, str) else key

    def key(self, name: str) -> str:
        """The key under which the field ``name`` is written."""
        return self._names(name)[0]


def differing_fields(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which ``config`` differs from ``other``, as "field=value" of ``config``."""
    return [
        f"{each.name}={getattr(config, each.name)!r}"
        for each in dataclasses.fields(ModelConfig)
        if getattr(other, each.name) != getattr(config, each.name)
    ]


_DEFAULTS = {each.name: each.default for each in dataclasses.fields(ModelConfig)}
_REQUIRED = tuple(name for name, value in _DEFAULTS.items() if value is dataclasses.MISSING)


@functools.cache
def _log_dropout(name: str, keys: tuple[str, ...]) -> None:
    """Logs ignored dropout keys, once per family and set of keys."""
    logger.warning(
        "config.json of the %s model asks for dropout (%s), which is ignored; the setting "
        "hidden_dropout_prob enables dropout of hidden states",
        name,
        ", ".join(keys),
    )


@functools.cache
def _log_extension(name: str, key: str) -> None:
    """Logs the use of an extension key, once per family and key."""
    logger.warning(
        "config.json of the %s model has %s, which the original implementation does not read; it "
        "is used here, so other programs compute another model from this folder",
        name,
        key,
    )
