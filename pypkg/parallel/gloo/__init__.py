"""An adapter for fleet on CPU processes that communicate over gloo. It is not loaded for NCCL.

``install.py`` installs it into fleet, once per process. Only ``mesh.py`` imports this subpackage.
No other module distinguishes CPU processes from GPUs.
"""
