"""Recovery from bad steps: a run rolls back, skips samples, and records both in the ledger.

``spikes.py`` decides which loss or gradient norm is a spike, ``healer.py`` what the run does then.
All ranks take the same decision.
"""
