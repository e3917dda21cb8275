"""Training: the loop and its step, the loss, validation, metrics, and what a run is built of."""
