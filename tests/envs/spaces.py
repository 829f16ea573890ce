"""Environments with any spaces, which keep the actions that they receive."""

import gymnasium


class Any(gymnasium.Env):
    """Every observation is a sample; an episode has so many steps, None never ends."""

    def __init__(self, observations, actions, steps=5):
        self.observation_space, self.action_space = observations, actions
        self.steps, self.received = steps, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.received.append(action)
        self.at += 1
        return self.observation_space.sample(), 1.0, False, self.at == self.steps, {}
