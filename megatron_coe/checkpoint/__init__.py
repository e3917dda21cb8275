"""Checkpoint folders: written whole or not at all, verified and vetted before they are read."""
