"""Which models are tried with which methods."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit import models
from lowbit.methods import Method


def pairs(methods: Mapping[str, Method]) -> list[tuple[str, str]]:
    """Every method with LeNet, and every model with one method of each order of blocks, as (model, method).

    A model knows of a method only the order, so that all models with all methods would say little more.
    """
    of_order: dict[str, str] = {}
    for key, method in methods.items():
        of_order.setdefault(method.block, key)
    orders = [(model, key) for model in models.registry for key in of_order.values()]
    return orders + [("lenet", key) for key in methods if ("lenet", key) not in orders]
