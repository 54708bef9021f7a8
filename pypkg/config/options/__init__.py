"""Settings that hold several options: words of the ``*_config`` strings, and ``profiler_options``.

The module of each says which words there are, what they mean and what is refused.
"""
