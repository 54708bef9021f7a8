"""Benchmark of the kernels on a GPU with torch, Liger and FlexAttention, without Paddle.

Nothing here imports Paddle, since the machine has only the kernels and torch.
"""
