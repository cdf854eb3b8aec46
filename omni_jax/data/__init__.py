"""Corpora, records of spoken exchanges, and the batches that training reads."""
