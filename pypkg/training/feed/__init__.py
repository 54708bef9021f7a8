"""The batches that each rank gets: samples of the settings' data, shared among the ranks.

``samples.py`` is the trainer's data source (``data_source.py``). What a sample contains is decided
in ``pypkg.data``.
"""
