"""D4RL-normalized scores: 100 (return - random) / (expert - random)."""

# (random, expert) undiscounted returns per environment, Fu et al. 2020, from the released code.
REFERENCES: dict[str, tuple[float, float]] = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
}
