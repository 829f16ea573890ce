"""What goes wrong, in words for people: the command line shows the message and no traceback."""


class ConfigError(ValueError):
    """A setting that does not exist or has the wrong type; names the nearest one."""


class DataError(ValueError):
    """A data set that cannot be used; the message names the field, the row and the remedy."""


class DownloadError(OSError):
    """A file that could not be had; the message names the URL, the reason and the alternatives."""


class Diverged(RuntimeError):
    """A quantity became NaN, infinite or absurd; the message names the first and its update."""


class Failed(RuntimeError):
    """A run that stopped for a reason told in the message."""


class Interrupted(Exception):
    """The run was stopped by a signal after its checkpoint was written."""
