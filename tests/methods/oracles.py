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


def bireal_sign_gradient(x: Array, g: Array) -> Array:
    """Bi-Real Net (arXiv 1808.00278), equation 6: 2 + 2x on [-1, 0), 2 - 2x on [0, 1), else 0."""
    slope = [2 + 2 * v if -1 <= v < 0 else 2 - 2 * v if 0 <= v < 1 else 0.0 for v in x.ravel()]
    return np.where(np.array(slope).reshape(x.shape) == 0, 0.0, np.array(slope).reshape(x.shape) * g)


def constant_alpha_gradient(weight: Array, g: Array) -> Array:
    """Bi-Real Net, section 3.3: the mean of |W| of the filter, times g where |W| <= 1."""
    rows = [gw * np.sum(np.abs(w)) / w.size * inside(w) for w, gw in zip(weight, g, strict=True)]
    return np.stack(rows)


def rprelu(x: Array, gamma: Array, slope: Array, zeta: Array) -> Array:
    """ReActNet (arXiv 2003.03488), equation 3, over (N, C, ...), element by element."""
    result = np.empty_like(x)
    for index in np.ndindex(x.shape):
        c = index[1]
        moved = x[index] - gamma[c]
        result[index] = (moved if moved > 0 else slope[c] * moved) + zeta[c]
    return result


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


def xnor_k_map(
    x: Array, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Array, Array]:
    """XNOR-Net, section 3.2: K = A * k for one group (N, C, H, W), and dK/dA, both by walking over the window.

    A is the mean of |x| over the channels and k is 1 / (kh kw) everywhere; what lies outside the image is 0.
    """
    a = np.sum(np.abs(x), axis=1) / x.shape[1]
    height, width = x.shape[2:]
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    ]
    result, slope = np.zeros((len(x), *out)), np.zeros((*out, height, width))
    for oy, ox, ky, kx in np.ndindex(*out, *kernel):
        y, column = oy * stride[0] - padding[0] + ky * dilation[0], ox * stride[1] - padding[1] + kx * dilation[1]
        if 0 <= y < height and 0 <= column < width:
            result[:, oy, ox] += a[:, y, column] / (kernel[0] * kernel[1])
            slope[oy, ox, y, column] += 1 / (kernel[0] * kernel[1])
    return result, slope


def hard_sigmoid(x: Array) -> Array:
    """BNN, equation 3, and BinaryConnect (arXiv 1511.00363), equation 3: the probability of +1."""
    return np.minimum(1.0, np.maximum(0.0, (x + 1) / 2))


def layer_sign(weight: Array) -> Array:
    """DoReFa-Net (arXiv 1606.06160), 1-bit weights: E|W| of the layer times sign(W)."""
    return np.sum(np.abs(weight)) / weight.size * sign(weight)


def ternary(weight: Array) -> Array:
    """TWN (arXiv 1605.04711): one threshold, 0.7 of the mean of |W|; alpha from the loop over what passes it."""
    threshold = 0.7 * np.sum(np.abs(weight)) / weight.size
    passing = [abs(w) for w in weight.ravel() if abs(w) > threshold]
    alpha = sum(passing) / len(passing) if passing else 0.0
    return np.where(weight > threshold, alpha, np.where(weight < -threshold, -alpha, 0.0))


def quantize_k(r: Array, k: int) -> Array:
    """DoReFa-Net, equation 5; halves go to the even neighbour."""
    return np.rint((2**k - 1) * r) / (2**k - 1)


def dorefa_weight(weight: Array, k: int) -> Array:
    """DoReFa-Net, k bits: 2 quantize_k(tanh(W) / (2 max|tanh(W)|) + 1/2) - 1."""
    t = np.tanh(weight)
    return 2 * quantize_k(t / (2 * np.max(np.abs(t))) + 0.5, k) - 1


def dorefa_weight_gradient(weight: Array, g: Array) -> Array:
    """The chain through tanh, with the rounding as the identity and the maximum as a constant."""
    t = np.tanh(weight)
    return g / np.cosh(weight) ** 2 / np.max(np.abs(t))


def dorefa_activation(x: Array, k: int) -> Array:
    """quantize_k(clip(x, 0, 1))."""
    return quantize_k(np.minimum(1.0, np.maximum(0.0, x)), k)


def dorefa_activation_gradient(x: Array, g: Array) -> Array:
    """g inside [0, 1], else 0."""
    return np.where((x >= 0) & (x <= 1), g, 0.0)


def dorefa_gradient_moments(g: Array, k: int) -> tuple[Array, Array]:
    """Mean and variance of the k-bit gradient, sample by sample (axis 0).

    In units of a step 2m / (2^k - 1), noise of [-1/2, 1/2) makes rounding a choice between the neighbours of u, the
    upper one with probability frac(u): mean u, variance frac(u) (1 - frac(u)).
    """
    mean, variance = np.zeros_like(g), np.zeros_like(g)
    for i, sample in enumerate(g):
        m = np.max(np.abs(sample))
        if m == 0:
            continue
        step = 2 * m / (2**k - 1)
        fraction = np.mod((2**k - 1) * (sample / (2 * m) + 0.5), 1.0)
        mean[i], variance[i] = sample, fraction * (1 - fraction) * step**2
    return mean, variance


def half_wave(x: Array, levels: Array) -> Array:
    """HWGQ (arXiv 1702.00953), equation 5: 0 for what is not above 0, else the nearest level above 0, ties down."""
    result = np.zeros_like(x)
    for index, value in np.ndenumerate(x):
        if value > 0:
            distances = [abs(min(value, 1e30) - level) for level in levels]
            result[index] = levels[int(np.argmin(distances))] if np.isfinite(value) else levels[-1]
    return result


def half_wave_gradient(x: Array, g: Array, q_max: float, form: str) -> Array:
    """HWGQ, section 4: the derivatives of the three forward approximations."""
    above = {"vanilla": g, "clipped": 0 * g, "log_tailed": g / np.where(x > q_max, x - (q_max - 1), 1)}[form]
    return np.where(x > q_max, above, np.where(x > 0, g, 0.0))


def half_normal_error(levels: Array) -> float:
    """The integral of (Q(x) - x)^2 under the density of N(0, 1), x > 0, by the midpoint rule."""
    width = 1e-4
    x = np.arange(width / 2, 9, width)
    bounds = (levels[1:] + levels[:-1]) / 2
    q = levels[np.searchsorted(bounds, x)]
    return float(np.sum((q - x) ** 2 * np.exp(-(x**2) / 2)) * width / np.sqrt(2 * np.pi))


def through_standardisation(c: Array, h: Array, terms: int, eps: float = 0.0) -> Array:
    """From h = dL/dz to dL/dW for z = c / sqrt(sum(c^2) / terms + eps), c = W - mean(W): by the quotient rule."""
    variance = np.sum(c**2) / terms + eps
    of_c = h / np.sqrt(variance) - c * np.sum(h * c) / (terms * variance**1.5)
    return of_c - np.mean(of_c)


def decaying_slope(x: Array, t: float) -> Array:
    """IR-Net (arXiv 1909.10788), section 3.3: k t (1 - tanh^2(t x)), as a hyperbolic secant."""
    return max(1 / t, 1.0) * t / np.cosh(t * x) ** 2


def decaying_sharpness(epoch: int, epochs: int) -> float:
    """IR-Net, section 3.3: t_min 10^(i/N log10(t_max/t_min))."""
    return float(0.1 * 10 ** (epoch / epochs * np.log10(10 / 0.1)))


def irnet_weight(weight: Array) -> Array:
    """IR-Net, section 3.2: sign of the standardised filter, shifted by round(log2 of its mean size)."""
    result = np.zeros_like(weight)
    for i, row in enumerate(weight):
        z = (row - np.mean(row)) / np.std(row, ddof=1)
        result[i] = sign(row - np.mean(row)) * 2.0 ** np.rint(np.log2(np.mean(np.abs(z))))
    return result


def irnet_weight_gradient(weight: Array, g: Array, t: float) -> Array:
    """The slope of the estimator, times the shift, through the standardisation."""
    result = np.zeros_like(weight)
    for i, (row, q) in enumerate(zip(weight, irnet_weight(weight), strict=True)):
        c = row - np.mean(row)
        h = g[i] * np.abs(q) * decaying_slope(c / np.std(row, ddof=1), t)
        result[i] = through_standardisation(c, h, row.size - 1)
    return result


def laplace_quantile(p: float, b: float) -> float:
    """Of the density exp(-|x| / b) / (2 b), for p above 1/2: solved from its tail, exp(-x / b) / 2 = 1 - p."""
    return float(b * np.log(1 / (2 * (1 - p))))


def recu_weight(weight: Array, tau: float) -> tuple[Array, Array, Array]:
    """ReCU (arXiv 2103.12369) and its code: alpha sign(W), the standardised weights, and where they are not clamped."""
    c = np.stack([row - np.mean(row) for row in weight])
    v = np.stack([row * 2 * np.sqrt(2) / np.sqrt(np.sum(row**2) / (row.size - 1) + 1e-5) for row in c])
    bound = laplace_quantile(tau, float(np.mean(np.abs(v))))
    alpha = [np.mean(np.minimum(np.abs(row), bound)) for row in v]
    return np.stack([a * sign(row) for a, row in zip(alpha, c, strict=True)]), v, np.abs(v) <= bound


def recu_weight_gradient(weight: Array, g: Array, tau: float) -> Array:
    """Straight through the sign and the clamp, times alpha, through the standardisation."""
    q, _, free = recu_weight(weight, tau)
    h = np.where(free, g * np.abs(q), 0.0) * 2 * np.sqrt(2)
    rows = zip(weight, h, strict=True)
    return np.stack([through_standardisation(row - np.mean(row), hr, row.size - 1, 1e-5) for row, hr in rows])


def triangle(x: Array) -> Array:
    """Bi-Real Net (arXiv 1808.00278): 2 + 2x on [-1, 0), 2 - 2x on [0, 1), else 0."""
    return np.where((x >= -1) & (x < 0), 2 + 2 * x, np.where((x >= 0) & (x < 1), 2 - 2 * x, 0.0))


def recu_activation_gradient(x: Array, g: Array) -> Array:
    """The triangle of each sample over its deviation (which centres the numbers, but not the quotient)."""
    result = np.zeros_like(x)
    for i, sample in enumerate(x):
        variance = np.var(sample, ddof=1) + 1e-5
        h = g[i] * triangle(sample / np.sqrt(variance))
        pull = (sample - np.mean(sample)) / (sample.size - 1)
        result[i] = h / np.sqrt(variance) - pull * np.sum(h * sample) / variance**1.5
    return result


def adabin_weight(row: Array) -> Array:
    """AdaBin (arXiv 2208.08084), section 3.2, for one filter: mean -+ the norm of what is left over sqrt(n)."""
    beta = np.mean(row)
    return sign(row - beta) * np.linalg.norm((row - beta).ravel()) / np.sqrt(row.size) + beta


def adabin_weight_gradient(row: Array, g: Array, t: float) -> Array:
    """alpha S(z) + beta by the product rule, S' the estimator of IR-Net."""
    c = row - np.mean(row)
    alpha = np.sqrt(np.mean(c**2))
    of_alpha = np.sum(g * sign(c)) * c / (row.size * alpha)
    through = through_standardisation(c, g * alpha * decaying_slope(c / alpha, t), row.size)
    return through + of_alpha + np.mean(g)


def lsq_parts(v: Array, s: float, lowest: int, highest: int) -> tuple[Array, Array, Array]:
    """LSQ (arXiv 1902.08153), equations 1 to 3 and 5: q, dq/ds and dq/dv, number by number."""
    q, of_step, of_v = np.zeros_like(v), np.zeros_like(v), np.zeros_like(v)
    for index, value in np.ndenumerate(v):
        ratio = value / s
        if ratio <= lowest:
            q[index], of_step[index] = lowest * s, lowest
        elif ratio >= highest:
            q[index], of_step[index] = highest * s, highest
        else:
            q[index], of_step[index], of_v[index] = np.rint(ratio) * s, np.rint(ratio) - ratio, 1.0
    return q, of_step, of_v


def pact_activation(x: Array, alpha: float, k: int) -> Array:
    """PACT (arXiv 1805.06085), equations 1 and 2: the clip as a sum of absolute values, then k bits of [0, alpha]."""
    y = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)
    return np.rint(y * (2**k - 1) / alpha) * alpha / (2**k - 1)
