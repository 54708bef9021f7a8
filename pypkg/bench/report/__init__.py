"""Results of benchmarks as pages: tables and figures, one section per suite."""
