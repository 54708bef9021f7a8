"""From a settings file and a command line to ``Settings``: syntax, types, one list of problems.

The settings, their defaults and their limits are in ``pypkg/config/settings.py``. A new setting
changes nothing here.
"""
