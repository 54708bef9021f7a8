"""Shared by all operators: choice of the backend, argument checks, guards of the backward pass.

``library.py`` loads the compiled operators and chooses a backend once per process. No operator is
defined here. ``half_on_cpu.py`` replaces Paddle's operators, for training in 16 bits on a CPU.
"""
