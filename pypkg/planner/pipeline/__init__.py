"""Pipeline stages: when the passes of micro batches run, and what memory they share."""
