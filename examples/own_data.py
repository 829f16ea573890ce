"""Data of one's own, without an environment: a pendulum that was swung at random.

python examples/own_data.py 10_000
"""

import sys

import numpy as np

import offrl


def swings(episodes=40, steps=100, seed=0):
    """Logged steps: angle as (cos, sin) and speed, a torque in [-2, 2], and the reward."""
    rng = np.random.default_rng(seed)
    angle, speed = rng.uniform(-np.pi, np.pi, episodes), rng.uniform(-1, 1, episodes)
    rows = []
    for _ in range(steps):
        torque = rng.uniform(-2, 2, episodes)
        away = (angle + np.pi) % (2 * np.pi) - np.pi
        reward = -(away**2) - 0.1 * speed**2 - 0.001 * torque**2
        rows.append((np.cos(angle), np.sin(angle), speed, torque, reward))
        speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
        angle = angle + 0.05 * speed
    table = np.array(rows).transpose(2, 0, 1).reshape(-1, 5)  # one episode after the other
    cut = np.arange(1, len(table) + 1) % steps == 0
    return table[:, :3], table[:, 3:4], table[:, 4], np.zeros(len(table)), cut


if __name__ == "__main__":
    observations, actions, rewards, terminals, timeouts = swings()
    data = offrl.Dataset.from_arrays(
        observations, actions, rewards, terminals, timeouts, action_low=-2, action_high=2
    )
    run = offrl.train("td3bc", data=data, steps=int(sys.argv[1]))  # no environment: no score
    policy = offrl.load_policy(run.folder)  # another process, another day
    print(policy.act(observations[:3]))  # torques in [-2, 2]
    policy.export("policy.onnx")  # needs the extra `export`
