"""Time of a training step: rates of GPUs, seconds of a layer, seconds of a step.

A new GPU is a row of ``gpus.py``. ``published.py`` compares the planner with PaddleNLP's published
runs and plans no run of this package.
"""
