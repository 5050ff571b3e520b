"""Quantized layers, the blocks that models are made of, and projections of latent weights."""

from lowbit.layers.projection import attach_projections, project_
from lowbit.layers.quantized import QuantConv1d, QuantConv2d, QuantConv3d, QuantizedLayer, QuantLinear, quantized_twin

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
    "QuantizedLayer",
    "attach_projections",
    "project_",
    "quantized_twin",
]
