"""What fleet lacks on CPU processes that talk over gloo; never loaded where groups are NCCL's.

``install.py`` puts it into fleet, once per process. Only ``mesh.py`` imports this room, so no
other code has a branch for CPU processes.
"""
