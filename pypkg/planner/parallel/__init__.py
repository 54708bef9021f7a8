"""What ranks that share a layer hold and allocate: of a tensor group, and of a context group."""
