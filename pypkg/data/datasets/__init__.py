"""Which tokens are sample i: GPT samples of one corpus, blends, concatenations, their order.

``build.py`` makes them from paths and weights.
"""
