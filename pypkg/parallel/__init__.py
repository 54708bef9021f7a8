"""How the processes of a run work together: groups, layers, schedules, gradients, updates."""
