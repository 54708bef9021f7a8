"""One module per model family, each with ``FAMILIES``: its ``Family`` or, where file formats differ
in a detail, several of them.

A module here imports only ``config``, ``family``, ``llama_format`` and ``weight_map`` of
``pypkg.models.architecture``.
"""
