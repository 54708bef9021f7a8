"""What the ranks that share a layer allocate: of a tensor group, and of a context group."""
