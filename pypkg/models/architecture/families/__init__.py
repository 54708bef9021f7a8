"""One module per model family. ``FAMILIES`` holds a ``Family`` for each file format of the family.

A module here imports only ``config``, ``family``, ``llama_format``, ``megatron_format`` and
``weight_map`` of ``pypkg.models.architecture``.
"""
