"""From text files to a corpus: finding, reading, filtering, tokenizing, assembling.

``prepare.py`` runs the whole of it over several worker processes.
"""
