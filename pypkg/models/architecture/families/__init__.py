"""One module per model family. Its ``FAMILIES`` hold one ``Family`` per file format of the family.


A module here imports only ``config``, ``family``, ``llama_format`` and ``weight_map`` of
``pypkg.models.architecture``.
"""
