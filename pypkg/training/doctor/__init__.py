"""Checks of the machines, devices and inputs of a run, for ``pypkg doctor`` and the start of a run.

``facts.py`` observes a rank without judging, the other modules turn facts into findings, and
``examination.py`` fixes the order. A new check is a function that returns ``Finding`` objects. No
check changes the machine.
"""
