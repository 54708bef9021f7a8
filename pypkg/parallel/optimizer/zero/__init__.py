"""ZeRO: which rank updates which parameter, and when gradients and weights are sent.

``stages.py`` has a class for each stage. The other modules say when stage 2 sends gradients and
stage 3 sends weights. No optimizer is named here; an update rule is a class of its own
(``optimizer/protocol.py``).
"""
