"""Settings that hold several options: words of the ``*_config`` strings, and ``profiler_options``.

Each module defines the options, their meaning, and which of them are rejected.
"""
