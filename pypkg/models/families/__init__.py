"""One module per model family: how its config.json and its tensors' names read.

Each module has

- ``MODEL_TYPE``: the ``model_type`` of its config.json,
- ``ARCHITECTURES``: the class names under ``architectures``; the first is the one written,
- ``read_config(keys) -> ModelConfig`` and ``write_config(config) -> dict``,
- ``weight_map(config) -> WeightMap``.

A module here imports only ``pypkg.models.config`` and ``pypkg.models.weights``.
"""
