"""The packed file: a network as integers, and the rules that make it safe to run.

docs/contract.md lists the ops, their attributes and their tensors. NumPy only.
"""

from lowbit.packed.container import (
    FORMAT,
    PackedModel,
    parse,
    parse_with_values,
    read,
    read_with_values,
    validate,
    write,
)
from lowbit.packed.graph import MAX_INTEGER, MAX_SUM, WEIGHTS, WORD_BITS, OpCost, Value, check_graph

__all__ = [
    "FORMAT",
    "MAX_INTEGER",
    "MAX_SUM",
    "WEIGHTS",
    "WORD_BITS",
    "OpCost",
    "PackedModel",
    "Value",
    "check_graph",
    "parse",
    "parse_with_values",
    "read",
    "read_with_values",
    "validate",
    "write",
]
