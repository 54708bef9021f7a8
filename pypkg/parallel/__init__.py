"""How the processes of a run work together: groups, layers, schedules, gradients, updates.

Only ``mesh.py`` starts fleet and creates process groups. No module here depends on a model: layers,
parameters and gradients are arguments. Subpackages: ``optimizer``, ``comm``, ``context``,
``launch``, and ``gloo`` for CPU processes.
"""
