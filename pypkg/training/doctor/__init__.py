"""Whether the machines of a run can carry it: what is found, where, and how it is mended."""
