"""The Triton kernels without Paddle, and Triton's interpreter, which runs them on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parents[3] / "pypkg" / "ops" / "triton"


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def load(interpret: bool) -> ModuleType:
    """pypkg.ops.triton.kernels, under another name: pypkg.ops would import Paddle."""
    name = "pypkg_triton"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    if not interpret:
        return importlib.import_module(f"{name}.kernels")
    with interpreter():
        return importlib.import_module(f"{name}.kernels")


@contextmanager
def interpreter() -> Iterator[None]:
    """Kernels that are imported in this block are interpreted.

    Triton decides when it is imported, so this goes before any other import of it. The environment
    is left as it was: processes that are started later compile as usual.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        import triton.experimental.gluon
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(triton.language.sum, InterpretedFunction):
            raise RuntimeError("triton was imported before, without its interpreter")
        _correct()
        _speed_up()
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]


def _correct() -> None:
    """Two things that the interpreter of Triton 3.9 does otherwise than compiled code: it cuts
    float32 off to bfloat16 instead of rounding, and makes integers of a scalar mask."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if InterpreterBuilder.cast_impl.__module__ == __name__:
        return
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(source.data), np.uint16(0x7FFF), rounded)
        return TensorHandle(rounded.reshape(source.data.shape), tl.bfloat16)

    def create_splat(self: Any, block: Any, scalar: TensorHandle) -> TensorHandle:
        value = np.full(block.shape, scalar.data.item(), dtype=scalar.data.dtype)
        return TensorHandle(value, scalar.dtype.scalar)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_splat = create_splat


def _speed_up() -> None:
    """Leaves out two things that take half of the interpreter's time and change no result.

    Every call of a device function, such as tl.sum, looks through all names of triton.language to
    replace them, which the launch of the kernel has done. And additions and products of integers
    are made again in 64 bits, for an assertion that only a debug mode shows.
    """
    from triton.runtime import interpreter

    replace_names = functools.cache(interpreter._patch_lang)  # of triton.language.core they stay

    def call(self: interpreter.InterpretedFunction, *arguments: Any, **settings: Any) -> Any:
        replace_names(self.fn)
        return self.rewrite()(*arguments, **settings)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
