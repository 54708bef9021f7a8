"""Datasets of samples: GPT samples of one corpus, blends, concatenations, and sample orders.

``build.py`` creates them from paths and weights.
"""
