"""What a model is, without Paddle: its configuration, families, weight names and layer split.

Everything here runs on a machine without Paddle.
"""
