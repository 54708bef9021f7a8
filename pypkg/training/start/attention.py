"""The attention that a model runs on this device."""

from __future__ import annotations

import logging
import os

from pypkg.device.attention_choice import AttentionNeeds, choose_attention
from pypkg.device.capabilities import Capabilities
from pypkg.models.architecture.config import ModelConfig

logger = logging.getLogger("pypkg")


def attention_for(
    config: ModelConfig, dtype: str, capabilities: Capabilities, asked: str, ring: bool = False
) -> str:
    """The attention backend of a model. Also selects the GPU kernels that were measured fastest.

    Args:
        dtype: "float32", "float16" or "bfloat16", of the activations.
        asked: "auto" or another choice of ``choose_attention``.
        ring: whether keys and values go round the ranks of a context group.

    Returns:
        An argument of ``Decoder.use_attention``.
    """
    if ring:
        logger.info("attention: pypkg (only our operators take blocks of keys out of a ring)")
        return "pypkg"
    needs = AttentionNeeds(
        dtype=dtype,
        head_dim=config.head_dim,
        alibi=config.position_embedding == "alibi",
        softcap=bool(config.attn_logit_softcapping),
    )
    choice = choose_attention(asked, needs, capabilities)
    if choice.kernel:
        os.environ.setdefault("PYPKG_FLASH_ATTENTION", choice.kernel)
    logger.info(choice.describe())
    return choice.backend
