"""The cost of a layout before a run: memory, communication and time of a rank, by arithmetic."""
