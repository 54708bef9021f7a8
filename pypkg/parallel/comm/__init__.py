"""What lies above process groups: collectives, gathers, random states, counts of traffic.

For use outside of the forward and backward pass, except ``random_states.py``. Each function says
which ranks have to call it.
"""
