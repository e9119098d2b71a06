"""Architectures, weights in and out. Imports neither `data` nor `train`."""


class ModelError(ValueError):
    """A model or weight file that cannot be used. The message is one line that names the file, the key and the remedy."""
