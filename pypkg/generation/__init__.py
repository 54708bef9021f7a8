"""Text that a model writes after prompts.

``text`` completes prompts, for a run's samples and for trained models. ``prompts`` reads
prompts from a file. Training and inference both import this package; it imports neither.
"""
