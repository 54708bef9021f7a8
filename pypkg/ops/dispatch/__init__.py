"""What every operator calls: choice of the backend, argument checks, guards of the gradient.

``library.py`` loads the compiled operators and chooses a backend once per process. No operator is
defined here: a formula belongs to the module of its operator. ``half_on_cpu.py`` changes Paddle's
operators, for training in 16 bits on a CPU.
"""
