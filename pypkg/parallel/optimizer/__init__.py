"""From gradients to updated weights: averaging, ZeRO stages, clipping, loss scaling, update rules.

``updater.py`` is the optimizer step of every layout. ``distribute.py`` wraps the model. A new
optimizer is a class in ``rules`` that implements ``protocol.py`` and a line in ``factory.py``.
``zero``, clipping and checkpoints use only the protocol.
"""
