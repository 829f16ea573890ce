"""Downloads that appear whole or not at all."""

import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20  # bytes
PATIENCE = 60  # seconds without a byte before a server counts as gone


class DownloadError(OSError):
    """A file that is not available; the message names the URL, the reason and the alternatives."""


def fetch(url: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
    """Download `url` to `path`.

    The body goes to a temporary file beside `path`, which is renamed only when its size agrees
    with the server's and `check` accepts it; otherwise nothing is left behind.

    Args:
        check: raises ValueError or OSError if the file is not what it should be.

    Raises:
        DownloadError: no network, an HTTP error, a short body, a failed check, a place that is
            not writable or a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        reason = f"cannot write to {path.parent}: {error.strerror or error}"
        raise failure(
            url, path, f"{reason}; set OFFRL_HOME to a folder that is writable"
        ) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            receive(url, file.write, path.name)
        if check is not None:
            check(part)
        os.replace(part, path)
    except urllib.error.HTTPError as error:
        error.close()
        raise failure(url, path, f"the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise failure(url, path, f"no connection ({error.reason})") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise failure(url, path, str(error) or type(error).__name__) from error
    finally:
        part.unlink(missing_ok=True)


def receive(url: str, write: Callable[[bytes], object], name: str) -> None:
    """Stream the body of `url` into `write`.

    Raises:
        OSError: if it ends before the length that the server announced.
    """
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        announced = response.headers.get("Content-Length")
        size = None if announced is None else int(announced)
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None)
        received = 0
        with bar:
            while block := response.read(BLOCK):
                write(block)
                received += len(block)
                bar.update(len(block))
    if size is not None and received != size:
        raise OSError(f"the body ended after {received} of {size} bytes")


def failure(url: str, path: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"cannot download {url}: {reason}. Alternatives: source=generated needs no network; "
        f"put the file at {path}; or name a copy with dataset=/path/to/{path.name}"
    )
