"""Results of benchmarks as pages: tables, pictures, one section per suite."""
