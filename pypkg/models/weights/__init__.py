"""Weights: initial values, tensor-parallel shards, model folders and file formats."""
