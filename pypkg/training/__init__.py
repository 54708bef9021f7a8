"""A training run: assembly, loop, checkpoints, reports.

``run.py`` assembles a run from its settings; ``trainer.py`` is the loop. The packages are ``start``
(layout, sources, resuming), ``feed`` (batches), ``step`` (one step), ``healing`` (loss spikes),
``doctor`` (checks of machines and inputs), ``checkpoint`` and ``reporting``. The trainer receives
model, data source, engine, checkpointer and reporters from ``run.py``, so a new implementation of
one of them needs no change of the loop.
"""
