"""Environments of a user's own: `path/to/file.py:Class`, and `module:Id` as Gymnasium has it."""

import importlib
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from offrl.errors import ConfigError
from offrl.own import module_of, one_line


def spec_of(name: str) -> EnvSpec:
    """What `gymnasium.make` takes; imports the file or the module.

    Raises:
        ConfigError: no such file, module, class or id; one that cannot be imported; a class that is
            not a gymnasium.Env.
    """
    place, _, last = name.rpartition(":")
    if name.endswith(".py"):
        place, last = name, ""
    if not place.endswith(".py"):
        return of_module(place, last)
    path = Path(place).absolute()
    module = module_of(path)
    found = getattr(module, last, None)
    if not (isinstance(found, type) and issubclass(found, gymnasium.Env)):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, gymnasium.Env)
            and value.__module__ == module.__name__
        ]
        wrong = f"no class {last!r}" if found is None else f"{last}, which is not a gymnasium.Env"
        known = f"its environments: {', '.join(classes) or 'none'}"
        raise ConfigError(f"{path} has {wrong}; name one as env={place}:Class ({known})")
    creator: Any = found  # its constructor may take anything
    return EnvSpec(id=last, entry_point=creator)


def of_module(module: str, id: str) -> EnvSpec:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the module does
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        )
        how = "install it, add its folder to PYTHONPATH, or name a file: env=path/to/file.py:Class"
        told = f"there is no module {module}; {how}" if missing else one_line(error)
        raise ConfigError(f"env={module}:{id} cannot be imported: {told}") from error
    if id not in gymnasium.registry:
        own = [key for key in gymnasium.registry if module in str(gymnasium.spec(key).entry_point)]
        known = f"of its own there are: {', '.join(own)}" if own else "it registers none of its own"
        raise ConfigError(f"the module {module} registers no environment {id!r}; {known}")
    return gymnasium.spec(id)
