"""What goes wrong, in words for people: the command line shows the message and no traceback."""

import errno

BUSY = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EBUSY}
CLOSED = {errno.EACCES, errno.EPERM}


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


def refusal(error: BaseException) -> str:
    """Why the system did not let a file be read, with the remedy; "" if what it holds is wrong."""
    if not isinstance(error, OSError) or error.errno in (None, errno.ENOENT):
        return ""
    if error.errno in BUSY:
        return "is in use: another process has locked it; wait until that one has closed it"
    if error.errno in CLOSED:
        return "may not be read by this user; change its permissions"
    return f"cannot be read: {error.strerror}"
