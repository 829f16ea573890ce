"""Checkpoints that are never half-written and never run code."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

FORMAT = 2


def save(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename.

    Raises:
        OSError: if the disk is full or not writable; the previous file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content | {"format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}; the previous checkpoint is intact") from error


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`: tensors and plain values, nothing executable.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, of another format, or holds anything else.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of this library: damaged, cut short, or holding objects "
            f"other than tensors and plain values, which are never loaded ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path} is not a checkpoint of this library (format missing)")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} is of checkpoint format {content['format']}, this version reads {FORMAT}: "
            "use the version of offrl that wrote it (run.json beside it names its commit)"
        )
    return content
