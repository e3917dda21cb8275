"""Training: settings, the objective, the loop, checkpoints and metrics."""
