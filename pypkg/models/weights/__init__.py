"""Weights in and out: initial values, tensor-parallel shards, model folders, file formats."""
