"""What a run does about steps that went wrong: it goes back, leaves out samples, keeps a ledger.

``spikes.py`` decides which loss or gradient norm is a spike, ``healer.py`` what follows. All ranks
take the same decision.
"""
