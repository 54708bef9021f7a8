"""Benchmarks of single operators: cases, frameworks of the baselines, limits, accuracy.

Every case is validated within ``accuracy.py`` before it is timed, and its work is counted in
``work.py``. A new operator is a module of ``cases``; a kernel without Paddle is a case of ``gpu``.
"""
