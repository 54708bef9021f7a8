"""The batches that each rank gets: samples of the settings' data, shared among the ranks."""
