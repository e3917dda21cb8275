"""What can turn out about data in the middle of a run; light enough for command lines to import."""


class DataError(ValueError):
    """Data that is damaged where no check had looked; the message names file and document."""
