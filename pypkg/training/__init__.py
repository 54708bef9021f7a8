"""A training run: assembly, loop, checkpoints, reports.

``run.py`` assembles a run from its settings, ``trainer.py`` is the loop. The rooms: ``start``
(layout, sources, resuming), ``feed`` (batches), ``step`` (one step), ``healing`` (loss spikes),
``checkpoint``, ``reporting``. The trainer receives model, data source, engine, checkpointer and
reporters from ``run.py``; a new one of these needs no change of the loop.
"""
