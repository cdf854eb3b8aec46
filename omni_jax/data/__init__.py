"""Spoken exchanges on disk, and the batches that training draws from them."""
