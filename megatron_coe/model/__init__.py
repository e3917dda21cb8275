"""The model: its configuration's rules."""
