"""Reads ``Settings`` from a file and the command line: syntax, types, one list of problems.

The settings, their defaults and limits are in ``pypkg/config/settings.py``. A new setting needs no
change here.
"""
