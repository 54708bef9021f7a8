"""Benchmark of the kernels on a GPU against torch, Liger and FlexAttention; needs no Paddle."""
