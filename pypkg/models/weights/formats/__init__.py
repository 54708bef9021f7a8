"""Formats of weight files: each says where a tensor lies, one reader takes slices from there."""
