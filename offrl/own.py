"""Python files of a user's own: methods and environments named by a path."""

import functools
import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType

from offrl.errors import ConfigError


@functools.cache
def module_of(path: Path) -> ModuleType:
    """The module that a file makes, run once.

    Raises:
        ConfigError: if there is no such file or it cannot be imported.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    place = zlib.crc32(str(path).encode())  # two files may have the same name
    name = f"offrl_own_{path.stem}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their types up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be imported: {one_line(error)}") from error
    return module


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks, and its type where the text may need it."""
    text, known = " ".join(str(error).split()), (ImportError, SyntaxError)
    return text if isinstance(error, known) else f"{type(error).__name__}: {text}"


def is_env(name: str) -> bool:
    """Whether an environment's name is of the form `file.py:Class` or `module:Id`."""
    return ":" in name or name.endswith(".py")


def title(name: str) -> str:
    """An environment as people call it, and as folders are called: without where it comes from."""
    return name.rpartition(":")[2] if is_env(name) else name


def absolute(name: str) -> str:
    """An environment's name with the whole path of its file, which holds in another folder too."""
    place, colon, last = name.rpartition(":")
    return f"{Path(place).absolute()}:{last}" if colon and place.endswith(".py") else name
