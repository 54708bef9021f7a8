"""A plan as text, JSON and picture.

Nothing here computes a plan. A new output is a module here and an option of ``pypkg plan``.
"""
