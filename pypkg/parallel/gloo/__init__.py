"""What fleet lacks on CPU processes that communicate over gloo. It is not loaded for NCCL.

``install.py`` installs it into fleet, once per process. Only ``mesh.py`` imports this room, so no
other code has a branch for CPU processes.
"""
