"""Training under DeepSpeed, checkpoints and evaluation. Imports `data` and `model`."""


class TrainError(ValueError):
    """A configuration or run that cannot go on. The message is one line that names the file, the key and the remedy."""
