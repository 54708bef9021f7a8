"""Models: configurations, the decoder, and weights in Hugging Face format.

Configurations (``ModelConfig``, ``registry``) do not need Paddle. The functions that build models
import Paddle on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pypkg.models.architecture.config import ModelConfig

if TYPE_CHECKING:
    from pypkg.models.pretrained import from_config, from_pretrained, save_pretrained

__all__ = ["ModelConfig", "from_config", "from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pypkg.models import pretrained

    return getattr(pretrained, name)
