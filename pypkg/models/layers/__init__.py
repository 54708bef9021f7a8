"""The layers of the decoder, and their positions, masks and recompute."""
