"""The update rules: one class that implements ``optimizer/protocol.py`` for each optimizer.

``weights.py`` and ``moments.py`` say how weights and moments are kept in memory and rounded. What
a rule needs to know of other ranks' pieces of a matrix comes from ``optimizer/pieces.py`` and
``whole_matrices.py``. Only ``optimizer/factory.py`` names the rules.
"""
