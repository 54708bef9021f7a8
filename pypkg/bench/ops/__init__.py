"""Benchmarks of single operators: cases, frameworks to compare with, limits, accuracy."""
