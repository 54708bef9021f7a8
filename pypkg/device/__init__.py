"""The machine of a run: CPU threads, what the device can do, and which attention follows from it.

Importing a module of this package imports no Paddle. ``threads`` has to come before Paddle.
"""
