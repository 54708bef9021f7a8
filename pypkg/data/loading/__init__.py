"""Batches of samples: objectives, packing, the loader and its prefetch threads.

Nothing here imports Paddle.
"""
