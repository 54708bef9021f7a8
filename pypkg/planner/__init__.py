"""Plans a run before it starts: memory and time of each rank, computed from the settings.

``memory.py`` runs a step on a tape of sizes (``tape.py``). The other modules mirror the code that
they plan: ``decoder.py`` the model, ``operators.py`` the operators, ``tensor_parallel.py``,
``pipeline.py``, ``interleaving.py``, ``zero.py`` and ``sliced_layers.py`` the layouts. A change of
what that code allocates needs the same change here. Rooms: ``time``, ``search``, ``output``.
Nothing here imports Paddle.
"""
