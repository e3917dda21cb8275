"""Training checkpoints to and from Hugging Face folders, on one CPU process, weight by weight."""
