"""Use of a trained model: text from prompts, losses on whole corpora.

``loading`` finds the model, its tokenizer and the device. ``corpora``, ``windows`` and ``evaluate``
measure losses; ``lm_eval`` gives a model to lm-evaluation-harness. ``pypkg.generation`` writes the
text. Training imports nothing from here.
"""
