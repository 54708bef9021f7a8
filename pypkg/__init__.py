"""Pre-training of large language models on PaddlePaddle with fused operators.

Importing this package imports neither Paddle nor the compiled operators; its modules do so when
they are used.
"""

__version__ = "0.1.0"
