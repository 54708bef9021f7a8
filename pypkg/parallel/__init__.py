"""How the processes of a run work together: groups, layers, schedules, gradients, updates.

``mesh.py`` alone starts fleet and makes groups. Nothing here knows a model: layers, parameters and
gradients come as arguments. Rooms: ``optimizer``, ``comm``, ``launch``, and ``gloo`` for CPU
processes.
"""
