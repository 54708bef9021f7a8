"""One training step: engine, loss normalization, learning rate, time per rank.

``engine.py`` runs a step over a global batch under every layout. The losses of the layouts agree
up to rounding; tests/matrix compares them.
"""
