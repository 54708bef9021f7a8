"""From samples to batches: objectives, packing, the loader and its prefetch thread.

Nothing here imports Paddle.
"""
