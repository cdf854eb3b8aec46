"""Text as a model takes it: cleaned up, written out as words, divided into sentences."""
