"""Downloads that appear whole or not at all."""

import http.client
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from offrl.data.dataset import once
from offrl.errors import DownloadError

logger = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes
PATIENCE = 60  # seconds without a byte before a server counts as gone


def fetch(url: str, path: Path, check: Callable[[Path], Any] = lambda part: None) -> None:
    """Download `url` to `path`.

    The body goes to a temporary folder beside `path` and is moved only when its size agrees with
    the server's and `check` does not raise ValueError or OSError; otherwise nothing is left behind.

    Raises DownloadError for no network, an HTTP error, a short body, a failed check, a place that
    is not writable or a full disk.
    """
    logger.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        reason = f"cannot write to {path.parent}: {error.strerror or error}"
        raise failure(url, path, f"{reason}; set OFFRL_HOME to a writable folder") from error
    try:
        with place:
            part = Path(place.name, path.name)
            receive(url, part)
            check(part)
            os.replace(part, path)
    except urllib.error.HTTPError as error:
        error.close()
        raise failure(url, path, f"the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise failure(url, path, f"no connection ({error.reason})") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise failure(url, path, str(error) or type(error).__name__) from error


def receive(url: str, path: Path) -> None:
    """Stream the body of `url` into a file; OSError if it ends before the announced length."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as response, path.open("wb") as file:
        size = response.headers.get("Content-Length")
        total = None if size is None else int(size)
        with tqdm.wrapattr(response, "read", total, desc=path.name, disable=None) as body:
            shutil.copyfileobj(body, file, BLOCK)
        if total is not None and file.tell() != total:
            raise OSError(f"the body ended after {file.tell()} of {size} bytes")


def located(url: str, path: Path, theirs: Path, check: Callable[[Path], Any]) -> Path:
    """`path`, or `theirs`, another package's copy; fetched to `path` where neither is there."""
    if theirs.is_file() and not path.is_file():
        return theirs
    once(path, path.is_file, lambda: fetch(url, path, check))
    return path


def failure(url: str, path: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"cannot download {url}: {reason}. Alternatives: source=generated needs no network; "
        f"put the file at {path}; or name a copy with dataset=/path/to/{path.name}"
    )
