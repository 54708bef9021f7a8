"""The machine of a run: CPU threads, capabilities of the device, and the choice of attention.

Importing a module of this package does not import Paddle. ``threads`` must be used before Paddle is
imported.
"""
