"""Training runs: Lightning turns the loop, everything else is here."""

from lowbit.training.run import train
from lowbit.training.settings import TrainConfig

__all__ = ["TrainConfig", "train"]
