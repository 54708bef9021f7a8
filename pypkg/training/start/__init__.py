"""The start of a run: checks of the settings as a whole, layout, weights and checkpoint.

Problems are collected and reported together, before anything is written. Checks of settings alone
belong to ``pypkg.config``.
"""
