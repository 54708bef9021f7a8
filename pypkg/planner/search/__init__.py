"""Plans of one layout (``plan.py``) and the search for the fastest layouts (``best.py``).

A plan joins memory and time, compares memory with the GPU, and proposes changes that make it fit.
"""
