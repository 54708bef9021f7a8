"""Results of benchmarks as pages: tables and figures, one section per suite.

A new kind of result is a module of ``sections``. Nothing here measures: pages are rendered from the
JSON results in docs/benchmarks.
"""
