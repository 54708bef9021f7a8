"""One module per model family, each with ``FAMILIES``: its ``pypkg.models.family.Family`` or, where
file formats differ in a detail, several of them.

A module here imports only ``config``, ``family``, ``llama_format`` and ``weights`` of
``pypkg.models``.
"""
