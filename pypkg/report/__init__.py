"""The page of a run: ``pypkg report OUTPUT_DIR`` writes what a run left as one HTML file.

``collect.py`` reads output_dir into a ``Document`` (``document.py``), ``page.py`` puts the document
into the template, ``server.py`` serves the page of a run in progress. The charts are drawn by uPlot
(``vendor``), everything else by the scripts in ``template``.

``pypkg compare-losses A B`` (``compare_losses.py``) compares two runs step by step
(``comparison.py``). Nothing here imports Paddle, and nothing changes a run.
"""
