"""Linear and embedding layers, under names that say how tensor parallelism would split them.

This is the only place that chooses the layer class. Parameters start at zero; the model draws
them or reads them from a file.
"""

from __future__ import annotations

import paddle
from paddle import nn


def column_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A linear layer whose output features are split. Weight [in_features, out_features]."""
    return _linear(in_features, out_features, has_bias)


def row_linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    """A linear layer whose input features are split. Weight [in_features, out_features]."""
    return _linear(in_features, out_features, has_bias)


def vocab_embedding(vocab_size: int, hidden_size: int) -> nn.Layer:
    """An embedding table whose rows are split. Weight [vocab_size, hidden_size]."""
    return nn.Embedding(vocab_size, hidden_size, weight_attr=_zeros())


def _linear(in_features: int, out_features: int, has_bias: bool) -> nn.Layer:
    return nn.Linear(in_features, out_features, _zeros(), _zeros() if has_bias else False)


def _zeros() -> paddle.ParamAttr:
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))
