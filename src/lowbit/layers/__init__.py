"""Quantized layers, the blocks that models are made of, and the rules that move latent weights."""

from lowbit.layers.activations import PReLU, RPReLU, Shift
from lowbit.layers.calibration import calibrate
from lowbit.layers.folding import fold_batch_norms_
from lowbit.layers.phases import start_epoch
from lowbit.layers.quantized import QuantConv1d, QuantConv2d, QuantConv3d, QuantizedLayer, QuantLinear, quantized_twin
from lowbit.layers.residual import Repeat, Residual, Shortcut
from lowbit.layers.rules import attach_rules, named_quantized_layers, project_, quantized_layers
from lowbit.layers.stem import Stem, patch_stem

__all__ = [
    "PReLU",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
    "QuantizedLayer",
    "RPReLU",
    "Repeat",
    "Residual",
    "Shift",
    "Shortcut",
    "Stem",
    "attach_rules",
    "calibrate",
    "fold_batch_norms_",
    "named_quantized_layers",
    "patch_stem",
    "project_",
    "quantized_layers",
    "quantized_twin",
    "start_epoch",
]
