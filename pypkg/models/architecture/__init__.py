"""Descriptions of models: configuration, families, weight names and layer split.

Nothing here imports Paddle.
"""
