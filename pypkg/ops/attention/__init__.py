"""Attention: masks, this package's kernels, Paddle's FlashAttention, packed projections.

``pypkg.ops`` exports the public functions. A new kind of mask needs a field of ``AttentionMask``,
and support in the kernels (``csrc/kernels/attention/attention_mask.h``) and in
``flash_attention_reference``.
"""
