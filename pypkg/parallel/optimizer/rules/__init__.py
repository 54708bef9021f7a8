"""The update rules: one class that implements ``optimizer/protocol.py`` for each optimizer.

``weights.py`` and ``moments.py`` define how weights and moments are stored and rounded. A rule that
needs the pieces of a matrix from other ranks uses ``optimizer/pieces.py`` and
``optimizer/whole_matrices.py``. Only ``optimizer/factory.py`` names the rules.
"""
