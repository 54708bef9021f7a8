"""Communication outside of the forward and backward pass; random states; counts of traffic.

The docstring of a function says which ranks must call it. ``random_states.py`` alone belongs to the
forward and backward pass.
"""
