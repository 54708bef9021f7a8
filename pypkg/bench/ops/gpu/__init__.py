"""Benchmark of the kernels on a GPU with torch, Liger and FlexAttention, without Paddle."""
