"""Triton kernels of the memory-bound operators, for a GPU without the compiled library.

Functions here have the names, arguments and contracts of those in ``pypkg._native`` (see
csrc/kernels/*.h) and take contiguous tensors of Paddle or torch, or anything with ``data_ptr()``,
``dtype``, ``shape`` and ``stride()``. They allocate nothing and check nothing: ``pypkg.ops`` does.
Nothing here imports a framework, and imports inside this folder are relative, so that it also loads
by itself where there is no Paddle.
"""
