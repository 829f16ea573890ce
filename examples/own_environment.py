"""An environment of one's own in one file: a boat on a windy lake heads for a buoy.

python scripts/train.py algo=sac env=examples/own_environment.py:Boat steps=20_000
python scripts/collect.py env=examples/own_environment.py:Boat dataset=random out=boat.npz
python scripts/evaluate.py run=runs/sac/Boat/<time>
"""

import json

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

STEPS = 100


class Boat(gymnasium.Env):
    """Rudder (radians per step) and throttle (0 to 3); pays how much nearer the buoy comes."""

    observation_space = Dict(
        buoy=Box(-np.inf, np.inf, (2,), np.float32),  # ahead and to the left
        wind=Discrete(4),  # where it blows to: east, north, west, south
    )
    action_space = Box(np.float32([-0.5, 0]), np.float32([0.5, 3]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.heading = 0, self.np_random.uniform(-np.pi, np.pi)
        self.place, self.wind = self.np_random.uniform(-20, 20, 2), int(self.np_random.integers(4))
        return self.seen(), {}

    def step(self, action):
        before, (rudder, throttle) = np.linalg.norm(self.place), action
        self.time, self.heading = self.time + 1, self.heading + rudder
        drift = self.wind * np.pi / 2
        self.place = self.place + throttle * np.array([np.cos(self.heading), np.sin(self.heading)])
        self.place = self.place + 0.3 * np.array([np.cos(drift), np.sin(drift)])
        distance = np.linalg.norm(self.place)
        return self.seen(), float(before - distance), bool(distance < 2), self.time == STEPS, {}

    def seen(self):
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        buoy = np.array([[cos, sin], [-sin, cos]]) @ -self.place  # it lies at (0, 0)
        return {"buoy": buoy.astype(np.float32), "wind": self.wind}

    # with these two a resumed run goes on exactly where it stopped
    def snapshot(self):
        state = {"time": self.time, "heading": float(self.heading), "place": self.place.tolist()}
        return state | {"wind": self.wind, "random": json.dumps(self.np_random.bit_generator.state)}

    def restore(self, state):
        self.time, self.heading, self.wind = state["time"], state["heading"], state["wind"]
        self.place = np.array(state["place"])
        self.np_random.bit_generator.state = json.loads(state["random"])
