"""What lies above process groups: collectives, gathers, random states, counts of traffic."""
