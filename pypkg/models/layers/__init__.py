"""The layers that the decoder is made of, and what they share: positions, masks, recompute."""
