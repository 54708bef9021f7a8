"""Attention: masks as descriptions, our kernels, Paddle's FlashAttention, packed projections.

``pypkg.ops`` exports the public functions. A new mask is a field of ``AttentionMask``, in the
kernels (``csrc/kernels/attention/attention_mask.h``) and in ``flash_attention_reference`` alike.
"""
