"""Index maps of a corpus (PaddleNLP's sample order) and their cache on disk."""
