"""Training: which parts learn, the loss, the step, the run."""
