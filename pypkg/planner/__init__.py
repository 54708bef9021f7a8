"""What a run will need before it is started: memory and time per rank, by arithmetic on settings.

Nothing here imports Paddle, so that a plan can be made on any laptop.
"""
