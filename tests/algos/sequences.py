"""What the tests of sequence methods share."""

import torch

from offrl.data import Dataset
from offrl.engine.method import Run, Spec, Task

SPEC = Spec(obs_dim=2, act_dim=2)


def two_arms(steps=5):
    """Episodes that always take +0.5 and earn 1 a step, and others that take -0.5 and earn 0."""
    act = torch.tensor([[0.5, 0.5], [-0.5, -0.5]]).repeat_interleave(steps, 0).repeat(20, 1)
    fields = dict(obs=torch.zeros(len(act), 2), act=act, reward=act[:, 0] + 0.5)
    return Dataset(fields, torch.arange(0, len(act), steps), torch.zeros(40), "two arms")


@torch.no_grad()
def played(algo, episodes, rewards, starts, scenario):
    """Actions (T, B, a) on given observations (T, B, o), whatever the policy does."""
    memory, found, reward = None, [], torch.zeros(episodes.shape[1])
    for t, obs in enumerate(episodes):
        now = {"obs": obs, "start": starts[t], "reward": reward, "scenario": scenario}
        act, memory = algo.act(now, memory)
        found.append(act)
        reward = rewards[t]
    return torch.stack(found)


def batch_equals_one_by_one(algo):
    """The actions of rows played together and each alone, over restarts, within 1e-5."""
    g = torch.Generator().manual_seed(2)
    obs, reward = torch.randn(9, 5, 2, generator=g), torch.randn(9, 5, generator=g)
    starts = torch.zeros(9, 5)
    starts[0], starts[3, 1], starts[7, 4] = 1, 1, 1
    scenario = torch.tensor([0, 1, 0, 1, 1])
    together = played(algo, obs, reward, starts, scenario)
    for i in range(5):
        row = slice(i, i + 1)
        alone = played(algo, obs[:, row], reward[:, row], starts[:, row], scenario[row])
        torch.testing.assert_close(together[:, row], alone, rtol=0, atol=1e-5)
    assert (together[0, 0] - together[0, 1]).abs().max() > 1e-4


def obeys_its_target(algo, method, steps):
    """Trained on two arms, the policy takes the one whose return it is asked for."""
    (stage,) = method.stages(algo, Task(SPEC, two_arms()), Run(steps=steps))
    sample = stage.start()
    for step in range(steps):
        for period, work in stage.between:
            if step % period == 0:
                work()
        stage.update(sample(algo.generator), 0)
    zero = torch.zeros(2)
    now = {"obs": torch.zeros(2, 2), "start": zero + 1, "reward": zero}
    act, _ = algo.act(now | {"scenario": torch.tensor([0, 1])})
    assert (act[0] - 0.5).abs().max() < 0.2
    assert (act[1] + 0.5).abs().max() < 0.2
