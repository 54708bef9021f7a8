"""Starting the ranks of a run and ending them together.

The launcher starts them; the watchdog of each rank sends heartbeats to the coordinator on rank 0,
which they find at the rendezvous.
"""
