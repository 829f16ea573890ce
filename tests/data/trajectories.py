"""Toy data whose observation is the state's index."""

import torch

from offrl.data import Dataset


def toy(lengths=(5, 3, 9)):
    """Episodes of so many transitions; state i has obs [i, 1] and act [i / 100]."""
    obs, nxt, act, timeout, first = [], [], [], [], 0
    for length in lengths:
        states = torch.arange(first, first + length + 1).float()
        obs.append(states[:-1])
        nxt.append(states[1:])
        act.append(states[:-1] / 100)
        timeout.append(torch.arange(length) == length - 1)
        first += length + 1
    column = lambda parts: torch.stack([torch.cat(parts), torch.ones(sum(lengths))], -1)  # noqa: E731
    fields = {
        "obs": column(obs),
        "next_obs": column(nxt),
        "act": torch.cat(act).unsqueeze(-1),
        "terminal": torch.zeros(sum(lengths)),
        "timeout": torch.cat(timeout).float(),
    }
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return Dataset(fields, starts, torch.zeros(len(lengths)), "toy")


def layout(lengths=(5, 3, 9)):
    """For every anchor i its last state f(i)."""
    out, first = {}, 0
    for length in lengths:
        out |= {first + t: first + length for t in range(length)}
        first += length + 1
    return out
