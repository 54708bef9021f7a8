"""Descriptions of models: configurations, families, weight names and pipeline stages.

Nothing here imports Paddle.
"""
