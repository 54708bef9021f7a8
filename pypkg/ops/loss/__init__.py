"""The loss of a language model: cross entropy, alone and fused with the output projection.

``pypkg.ops`` exports the public functions. Both use ``vocabulary_parallel.py`` if the vocabulary is
divided over the tensor group.
"""
