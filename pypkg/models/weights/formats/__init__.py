"""Formats of weight files. Each module locates tensors in a file; ``stored_tensor`` reads them."""
