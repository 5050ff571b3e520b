"""Loss, accuracy, confusion matrix, scores per class, and what a network costs."""

from lowbit.evaluation.evaluate import evaluate, evaluate_model
from lowbit.evaluation.profile import profile
from lowbit.evaluation.render import render

__all__ = ["evaluate", "evaluate_model", "profile", "render"]
