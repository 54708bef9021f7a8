"""Plans a run before it starts: memory and time of each rank, computed from the settings.

``memory.py`` runs a step on a tape of sizes (``tape.py``); ``engine.py`` runs its backward passes.
The other modules mirror the code that they plan: ``decoder.py`` and ``layer.py`` the model,
``operators.py`` and ``blocks.py`` the operators, ``parallel``, ``pipeline``, ``zero.py`` and
``sliced_layers.py`` the layouts. A change of what that code allocates needs the same change here.
Rooms: ``parallel``, ``pipeline``, ``time``, ``search``, ``output``.
Nothing here imports Paddle.
"""
