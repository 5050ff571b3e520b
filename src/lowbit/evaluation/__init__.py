"""Loss, accuracy, confusion matrix, scores per class, and what a network costs."""

from lowbit.evaluation.evaluate import default_output, evaluate, evaluate_model
from lowbit.evaluation.profile import profile
from lowbit.evaluation.render import render

__all__ = ["default_output", "evaluate", "evaluate_model", "profile", "render"]
