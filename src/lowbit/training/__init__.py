"""Training runs: Lightning turns the loop, everything else is here."""

from lowbit.training.run import TrainConfig, train

__all__ = ["TrainConfig", "train"]
