"""One training step: engine, loss normalization, learning rate, time per rank."""
