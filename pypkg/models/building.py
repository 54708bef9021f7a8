"""Builds a model. Its parameters are filled one by one, or have no memory yet."""

from __future__ import annotations

import paddle

from pypkg.console import progress
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.parameter_shapes import whole_parameters
from pypkg.models.decoder import Decoder
from pypkg.models.pipeline_decoder import PipelineDecoder
from pypkg.models.weights.tp_shards import tensor_parallel_problems
from pypkg.parallel.comm.slices import ReadParameter
from pypkg.parallel.pipeline import pipeline_degree
from pypkg.parallel.tp_layers import tensor_degree

DTYPES = ("float32", "float16", "bfloat16")

Model = Decoder | PipelineDecoder


def build_filled(config: ModelConfig, dtype: str, read: ReadParameter) -> Model:
    """A model of ``dtype``, or this rank's part of it, with parameters filled by ``read``.

    Raises:
        UserError: ``dtype`` is not one of DTYPES, or the model cannot be divided over the ranks.
    """
    with progress.phase("model"):
        model = _build(config, dtype)
    with progress.phase("weights"):
        for name, parameter in progress.through(list(model.named_parameters()), "filling"):
            read(name, parameter.shape, parameter)
    return model


def build_without_memory(config: ModelConfig, dtype: str) -> Model:
    """Like ``build_filled``, but a parameter has no memory until its ``initialize`` is called."""
    with paddle.LazyGuard():
        return _build(config, dtype)


def _build(config: ModelConfig, dtype: str) -> Model:
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    _check_divisible(config)
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(getattr(paddle, dtype))
    try:
        return Decoder(config) if pipeline_degree() == 1 else PipelineDecoder(config)
    finally:
        paddle.set_default_dtype(before)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by name, in its order. Nothing is allocated.

    The shapes are those of whole parameters, under every parallel layout.

    Raises:
        UserError: the model cannot be divided over the ranks of the tensor group.
    """
    _check_divisible(config)
    return {each.name: each.shape for each in whole_parameters(config)}


def _check_divisible(config: ModelConfig) -> None:
    if problems := tensor_parallel_problems(config, tensor_degree()):
        raise UserError("\n".join(problems))
