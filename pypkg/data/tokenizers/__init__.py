"""Tokenizers of every file format behind one interface, and BPE training.

``load.py`` picks the class; each format has a module of its own.
"""
