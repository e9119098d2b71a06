"""Raw folders to shards, shards to batches. Imports neither `model` nor `train`."""


class DataError(ValueError):
    """Bad data or a bad data argument. The message is one line that names the file, the key and the remedy."""
