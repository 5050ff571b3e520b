"""Parts that the methods share: the Quantizer contract and straight-through estimators."""
