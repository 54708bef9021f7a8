"""Communication outside of the forward and backward pass; random states; counts of traffic.

The docstring of each function names the ranks that must call it. Only ``random_states.py`` is used
in forward and backward passes.
"""
