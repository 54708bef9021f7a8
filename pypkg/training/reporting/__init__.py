"""What a run reports: metrics, progress, losses per source, summary, reporters.

A new destination of metrics is a class of ``reporters.py``. Nothing here changes the run.
"""
