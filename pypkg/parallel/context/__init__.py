"""Context parallelism: ranks train on the same samples, each on its own tokens of them.

Outside attention a rank processes only its own tokens. ``tokens`` defines which tokens these are.
``heads`` (Ulysses) and ``ring`` (ring attention) exchange queries, keys and values in attention. No
other module communicates over the context group in a forward or backward pass.
"""
