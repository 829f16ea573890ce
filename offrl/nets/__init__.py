"""Networks with optional leading axes for seeds and ensembles."""

from offrl.nets.actors import Actor, GaussianActor, squashed_log_prob
from offrl.nets.critics import Critics
from offrl.nets.linear import Linear
from offrl.nets.mlp import MLP, Standardize

__all__ = ["MLP", "Actor", "Critics", "GaussianActor", "Linear", "Standardize", "squashed_log_prob"]
