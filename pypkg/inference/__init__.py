"""What a finished model is used for: text from prompts, losses of whole corpora.

``text`` turns prompts into text and serves the samples of a run too. ``corpora``, ``windows`` and
``evaluate`` measure losses; ``lm_eval`` gives a model to lm-evaluation-harness. ``loading`` finds
the model, its tokenizer and the device.
"""
