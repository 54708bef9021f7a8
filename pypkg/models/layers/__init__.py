"""The layers of the decoder, and their positions, masks and recompute.

No layer tests for a family: a difference between families is a field of ``ModelConfig``. Linear
layers come from ``pypkg.parallel.tp_layers``, so that one code serves every layout.
"""
