"""What a step takes: rates of GPUs, seconds of layers and steps, proof by published runs."""
