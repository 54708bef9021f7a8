"""The loss of a language model: cross entropy, alone and fused with the output projection.

``pypkg.ops`` exports the public functions. ``vocabulary_parallel.py`` holds what both need when the
vocabulary is divided over the tensor group.
"""
