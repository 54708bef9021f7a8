"""The context axis: ranks that train on the same samples, each on its own tokens of them.

Between the attention of two layers a rank works on its tokens alone. ``tokens`` says which these
are, and ``heads`` and ``ring`` bring queries, keys and values together in attention. No other room
sends anything over the context group in a forward or backward pass.
"""
