"""What a model family is: how its config.json reads and what its tensors are called.

Nothing here imports Paddle.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.weight_map import WeightMap

logger = logging.getLogger("pypkg.models")

Keys = Mapping[str, Any]

# Token ids, whose keys in config.json have the same name everywhere.
TOKEN_IDS = {name: name for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Args:
        name: ``ModelConfig.model_type``.
        weight_map: the names and layouts of the tensors for a configuration.
        keys: field of ModelConfig to its key in config.json, or to several, of which the first
            present is read and the first is written.
        model_type: in config.json; ``name`` if empty.
        architectures: the class names in config.json; the first is written.
        auto_map: where transformers finds the classes of families that bring their own code.
        distinctive_key: a key that only this one of several families of a ``model_type`` has.
        fields: values of fields where a config.json has no key for them.
        fixed: keys that change the computation, with the only value that is supported.
        dropouts: keys of dropout probabilities. They are not followed, which is logged if one is
            not 0, and 0 is written.
        read_more: fields that take more than one key to read.
        write_more: their keys.
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
    dropouts: tuple[str, ...] = ()
    read_more: Callable[[Keys], dict[str, Any]] = _nothing
    write_more: Callable[[ModelConfig], dict[str, Any]] = _nothing

    def recognises(self, keys: Keys) -> bool:
        """Whether a config.json is of this family."""
        if self.distinctive_key and self.distinctive_key not in keys:
            return False
        architectures = keys.get("architectures") or []
        return keys.get("model_type") == (self.model_type or self.name) or any(
            each in self.architectures for each in architectures
        )

    def read_config(self, keys: Keys) -> ModelConfig:
        """The configuration in a config.json.

        Raises:
            UserError: a key is missing, or a value wrong or not supported.
        """
        for key, supported in self.fixed.items():
            if keys.get(key) is not None and keys[key] != supported:
                raise UserError(f"{key} is {keys[key]!r}; a {self.name} model needs {supported!r}")
        if active := tuple(key for key in self.dropouts if keys.get(key)):
            _log_dropout(self.name, active)
        values = dict(self.fields)
        for name, candidates in self.keys.items():
            for key in (candidates,) if isinstance(candidates, str) else candidates:
                if keys.get(key) is not None:
                    values[name] = keys[key]
                    break
        try:
            values.update(self.read_more(keys))
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"a {self.name} config.json holds a value of the wrong type: {error}"
            ) from error
        if missing := [name for name in _REQUIRED if values.get(name) is None]:
            written = [self._key(name) for name in missing]
            raise UserError(f"config.json lacks {', '.join(written)}")
        return ModelConfig(model_type=self.name, **values)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a config.json, in the form of transformers 4, which 5 reads as well.

        Raises:
            UserError: the family's config.json has no way to say what ``config`` says.
        """
        keys = {
            "model_type": self.model_type or self.name,
            **({"architectures": [self.architectures[0]]} if self.architectures else {}),
            **({"auto_map": dict(self.auto_map)} if self.auto_map else {}),
            **{self._key(name): getattr(config, name) for name in self.keys},
            **self.fixed,
            **dict.fromkeys(self.dropouts, 0.0),
            **self.write_more(config),
        }
        if lost := differing_fields(config, self.read_config(keys)):
            raise UserError(
                f"a {self.name} config.json cannot hold {', '.join(lost)} beside the other values; "
                "the model is not one that the original implementation has"
            )
        return keys

    def _key(self, name: str) -> str:
        key = self.keys.get(name, name)
        return key if isinstance(key, str) else key[0]


def differing_fields(config: ModelConfig, other: ModelConfig) -> list[str]:
    """What differs between two configurations, as "field=value of ``config``"."""
    return [
        f"{each.name}={getattr(config, each.name)!r}"
        for each in dataclasses.fields(ModelConfig)
        if getattr(other, each.name) != getattr(config, each.name)
    ]


_REQUIRED = tuple(
    each.name for each in dataclasses.fields(ModelConfig) if each.default is dataclasses.MISSING
)


@functools.cache
def _log_dropout(name: str, keys: tuple[str, ...]) -> None:
    """Once per family and set of keys."""
    logger.warning(
        "config.json of the %s model asks for dropout (%s), which is not followed; the setting "
        "hidden_dropout_prob brings dropout of hidden states",
        name,
        ", ".join(keys),
    )
