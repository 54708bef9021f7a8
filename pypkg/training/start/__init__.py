"""Before the first step: settings checked as a whole, layout, sources of weights and checkpoint."""
