"""Starting the ranks of a run and ending them together.

The launcher starts the processes. The ranks join the rendezvous. The watchdog of each rank then
sends heartbeats to the coordinator on rank 0. The coordinator ends all ranks if one of them fails.
"""
