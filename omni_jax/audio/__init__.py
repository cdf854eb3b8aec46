"""Sound on the host and its log-mel features: read, check, resample, write, and what the ear is fed."""
