"""Text that a model writes after prompts.

``text`` turns prompts into text, for a run's samples and for finished models. ``prompts`` reads
prompts from a file. Training and inference both import this package; it imports neither.
"""
