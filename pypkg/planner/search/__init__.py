"""Whether a layout fits its GPUs, what would make it fit, and which layouts are fastest."""
