"""Audio: reading and writing in any format, augmentation, and log-mel features."""
