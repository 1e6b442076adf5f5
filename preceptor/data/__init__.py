"""Text data: readers, sequences with response masks, batches."""
