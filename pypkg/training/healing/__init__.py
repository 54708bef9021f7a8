"""What a run does about bad steps: it rolls back, skips samples, and records both in the ledger.

``spikes.py`` decides which loss or gradient norm is a spike, ``healer.py`` what follows. All ranks
take the same decision.
"""
