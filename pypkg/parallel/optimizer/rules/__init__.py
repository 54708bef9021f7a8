"""The update rules: one class that implements ``optimizer/protocol.py`` for each optimizer.

``weights.py`` and ``moments.py`` define how weights and moments are stored and rounded.
``optimizer/pieces.py`` and ``whole_matrices.py`` provide what a rule needs from other ranks' pieces
of a matrix. Only ``optimizer/factory.py`` names the rules.
"""
