"""Index maps of a corpus (PaddleNLP's sample order) and the cache that keeps them on disk."""
