"""Training: stages, loss, the sharded step, the run that resumes."""
