"""The layers of the decoder, with positions, masks and recompute.

No layer tests for the name of a family: differences between families are fields of ``ModelConfig``.
Linear layers come from ``pypkg.parallel.tp_layers``, so the same code serves every layout.
"""
