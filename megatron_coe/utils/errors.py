"""Errors that several packages share (light to import)."""


class DataError(ValueError):
    """Data found damaged during training, where no check had looked; names file and document."""
