"""ZeRO: which rank updates which parameter, and when gradients and weights are sent.

``stages.py`` has a class for each stage. ``gradient_reducer.py`` reduces gradients in stage 2,
``weight_broadcast.py`` broadcasts updated weights in stages 1 and 2, and ``sliced_layers.py``
gathers weights and reduces gradients in stage 3. No update rule is named here
(``optimizer/protocol.py``).
"""
