"""Before the first step: settings checked as a whole, layout, sources of weights and checkpoint.

Problems are collected and reported together, before anything is written. Checks of settings alone
belong to ``pypkg.config``.
"""
