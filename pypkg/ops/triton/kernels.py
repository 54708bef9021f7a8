"""All Triton kernels in one module, like ``pypkg._native``. Importing it imports Triton."""

from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .gated_activation import gated_activation_backward, gated_activation_forward
from .rms_norm import rms_norm_backward, rms_norm_backward_workspace, rms_norm_forward
from .rotary_embedding import rotary_embedding

__all__ = [
    "cross_entropy_backward",
    "cross_entropy_forward",
    "gated_activation_backward",
    "gated_activation_forward",
    "rms_norm_backward",
    "rms_norm_backward_workspace",
    "rms_norm_forward",
    "rotary_embedding",
]
