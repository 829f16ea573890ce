"""How far the values of DQN runs on the grid world are from the optimal ones.

python scripts/train.py -m algo=dqn env=grid-world algo.beer=0,1e-3 seed=0,1,2
python scripts/grid_error.py runs/dqn/grid-world/*
"""

import sys
from pathlib import Path
from typing import Any

import torch

from offrl import config
from offrl.cli import readable_errors
from offrl.envs import grid
from offrl.envs.make import env_id
from offrl.errors import ConfigError
from offrl.runs.evaluate import checkpoints, load_algorithm
from offrl.runs.report import label


def main() -> None:
    with readable_errors():
        for name in sys.argv[1:]:
            folder, files = checkpoints(Path(name))
            resolved = config.of_run(folder)
            if resolved.algo != "dqn" or env_id(resolved.settings.env) != grid.ID:
                raise ConfigError(f"{folder} is not a run of algo=dqn env={grid.NAME}")
            options = resolved.config()
            obs, optimal = map(torch.from_numpy, grid.GridWorld().optimal(options.discount))
            for file in files:
                algo: Any
                algo, (seed, *_) = load_algorithm(resolved, file)
                with torch.no_grad():
                    error = (algo.network(obs) - optimal).abs().mean()
                print(f"{label(resolved)}, seed {seed}: mean |Q - Q*| {float(error):.4f}")
