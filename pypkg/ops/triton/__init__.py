"""Triton kernels of the memory-bound operators, for a GPU without the compiled library.

The functions have the names, arguments and contracts of those in ``pypkg._native`` (see
csrc/kernels/*/*.h). They take contiguous tensors of Paddle or torch, or any object with
``data_ptr()``, ``dtype``, ``shape`` and ``stride()``. ``pypkg.ops`` allocates outputs and checks
arguments; these functions do neither. The package imports no framework and uses relative imports,
so that it also loads on its own without Paddle.
"""
