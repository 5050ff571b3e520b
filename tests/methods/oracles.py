"""The methods' formulas in NumPy, float64, written from the papers and knowing nothing of the code under test."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def sign(x: Array) -> Array:
    """BNN (arXiv 1602.02830), equation 1, with sign(0) = +1."""
    return np.where(x >= 0, 1.0, -1.0)


def inside(x: Array) -> Array:
    """1{|x| <= 1}, both ends included."""
    return np.where((x >= -1) & (x <= 1), 1.0, 0.0)


def sign_gradient(x: Array, g: Array) -> Array:
    """BNN, equation 4: g where |x| <= 1, else 0."""
    return np.where(inside(x) == 1, g, 0.0)


def xnor_alpha(weight: Array) -> Array:
    """XNOR-Net (arXiv 1603.05279), equation 6: the mean of |W| over each filter, shape (filters,)."""
    return np.array([np.sum(np.abs(row)) / row.size for row in weight])


def xnor_forward(weight: Array) -> Array:
    """alpha * sign(W), per filter."""
    return np.stack([alpha * sign(row) for alpha, row in zip(xnor_alpha(weight), weight, strict=True)])


def xnor_jacobian(row: Array) -> Array:
    """d(alpha sign(W_j)) / dW_i at [i, j], by the product rule, with the straight-through window for dsign."""
    w = row.ravel()
    through_alpha = np.outer(sign(w) / w.size, sign(w))
    through_sign = np.diag(np.mean(np.abs(w)) * inside(w))
    return through_alpha + through_sign


def xnor_gradient_exact(weight: Array, g: Array) -> Array:
    """The Jacobian times g, filter by filter."""
    rows = [(xnor_jacobian(w) @ gw.ravel()).reshape(w.shape) for w, gw in zip(weight, g, strict=True)]
    return np.stack(rows)


def xnor_gradient_paper(weight: Array, g: Array) -> Array:
    """XNOR-Net, section 3.1: g_i (1/n + alpha 1{|W_i| <= 1})."""
    rows = [gw * (1 / w.size + np.mean(np.abs(w)) * inside(w)) for w, gw in zip(weight, g, strict=True)]
    return np.stack(rows)


def xnor_best_approximation(row: Array) -> Array:
    """The alpha * B nearest to ``row``, by trying every B in {-1, 1}^n with its best alpha."""
    w = row.ravel()
    candidates = []
    for signs in itertools.product((-1.0, 1.0), repeat=w.size):
        b = np.array(signs)
        alpha = max(0.0, float(w @ b) / w.size)
        candidates.append((float(np.sum((w - alpha * b) ** 2)), tuple(alpha * b)))
    return np.array(min(candidates)[1]).reshape(row.shape)


def center(weight: Array) -> Array:
    """Subtract the mean over input channels (axis 1), for each filter and tap."""
    if weight.shape[1] == 1:
        return weight
    result = weight.copy()
    for index in np.ndindex(weight.shape[0], *weight.shape[2:]):
        taps = (index[0], slice(None), *index[1:])
        result[taps] = weight[taps] - np.sum(weight[taps]) / weight.shape[1]
    return result


def clamp(weight: Array) -> Array:
    """Everything above 1 becomes 1, everything below -1 becomes -1."""
    return np.where(weight > 1, 1.0, np.where(weight < -1, -1.0, weight))
