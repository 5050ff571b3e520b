"""Every number on docs/backpropagation.md, recomputed with lowbit."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from lowbit.methods.xnor_net import ScaledSign
from lowbit.quantizers import ste

PAGE = (Path(__file__).parents[2] / "docs/backpropagation.md").read_text(encoding="utf-8")
NUMBER = r"-?\d+(?:\.\d+)?"


def section_1(w: Tensor) -> dict[str, Any]:
    def error(alpha: float, signs: Tensor) -> float:
        return float((w - alpha * signs).square().sum())

    q = ScaledSign()(w[None])[0]
    best, alpha = ste.signs(w), float(q.abs()[0])
    others = [tensor(b) for b in itertools.product((-1.0, 1.0), repeat=4) if not torch.equal(tensor(b), best)]
    return {
        "filter": w,
        "signs": best,
        "alpha": alpha,
        "J at the best signs and alpha": error(alpha, q / alpha),
        "J at the best signs, alpha = 1": error(1, best),
        # The best scale of other signs, where it is positive, is W'B / n as well.
        "lowest J of any other signs": min(error(max(0.0, float(w @ b) / 4), b) for b in others),
    }


def section_3() -> dict[str, Any]:
    """The coin, over evenly spaced u."""
    t, count = 0.2, 4000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) * 2 / count - 1

    def mean_loss(x: float) -> float:
        return float((0.5 * (ste.signs(x + u) - t).square()).mean())

    x = torch.full((count,), 0.5, dtype=torch.float64)
    estimated = ste.window(ste.signs(x + u) - t, x).mean()
    plain = torch.tensor(0.5, requires_grad=True)
    (0.5 * (ste.sign(plain) - t) ** 2).backward()
    assert float(plain.grad or 0) == pytest.approx(0.8)
    return {
        "x": 0.5,
        "t": t,
        "true slope of the mean loss": (mean_loss(0.6) - mean_loss(0.4)) / 0.2,
        "mean of the estimator": float(estimated),
    }


def section_4() -> dict[str, Any]:
    x = tensor([0.3, -0.7, 1.5, -0.2], requires_grad=True)
    w = tensor([[0.5, -0.2, 0.8, -0.5], [-0.3, 1.1, 0.1, 0.1]], requires_grad=True)
    v = tensor([[0.6, -0.2]], requires_grad=True)
    t = 0.3

    def forward(form: Any, w: Tensor, v: Tensor) -> dict[str, Tensor]:
        a = ste.sign(x)
        q_w, q_v = ScaledSign(form)(w), ScaledSign(form)(v)
        h = q_w @ a
        b = ste.sign(h)
        y = q_v @ b
        return {"a": a, "q_w": q_w, "h": h, "b": b, "q_v": q_v, "y": y, "loss": 0.5 * (y - t).square().sum()}

    f = forward("exact", w, v)
    of = dict(
        zip(
            ("y", "q_v", "b", "h", "q_w", "x", "w", "v"),
            torch.autograd.grad(f["loss"], (f["y"], f["q_v"], f["b"], f["h"], f["q_w"], x, w, v), retain_graph=True),
            strict=True,
        )
    )
    paper = forward("paper", w, v)
    w_paper, v_paper = torch.autograd.grad(paper["loss"], (w, v))
    through_sign = 0.4 * ste.window(of["q_w"][1], w[1])
    assert not of["w"][0].any()
    assert not w_paper[0].any()
    new_w, new_v = w.detach() - 0.5 * of["w"], v.detach() - 0.5 * of["v"]
    new = forward("exact", new_w, new_v)
    assert float(of["q_v"][0] @ ste.signs(v[0])) == pytest.approx(1.0)
    assert float(of["q_w"][1] @ ste.signs(w[1])) == pytest.approx(0.4)
    return {
        "x": x,
        "W, row 1": w[0],
        "W, row 2": w[1],
        "V": v,
        "t": t,
        "a": f["a"],
        "alpha of W": f["q_w"].abs()[:, 0],
        "h": f["h"],
        "b": f["b"],
        "alpha of V": f["q_v"].abs()[0, 0],
        "y": f["y"],
        "L": f["loss"],
        "dL/dy": of["y"],
        "dL/dqV": of["q_v"],
        "dL/dV, exact": of["v"],
        "dL/dV, paper": v_paper,
        "dL/db": of["b"],
        "dL/dh": of["h"],
        "dL/dqW, row 2": of["q_w"][1],
        "through alpha": of["w"][1] - through_sign,
        "through the sign": through_sign,
        "dL/dW row 2, exact": of["w"][1],
        "dL/dW row 2, paper": w_paper[1],
        "dL/dx": of["x"],
        "new V": new_v,
        "new W, row 2": new_w[1],
        "new alpha of W": new["q_w"].abs()[:, 0],
        "new y": new["y"],
        "new L": new["loss"],
    }


def rows(section: int) -> dict[str, list[float]]:
    """Name and numbers of each row of the tables of one section."""
    text = re.split(r"^## ", PAGE, flags=re.MULTILINE)[section]
    found = re.findall(r"^\| ([^|\n]+?) \| ([^|\n]+?) \|", text, re.MULTILINE)
    return {name: [float(n) for n in re.findall(NUMBER, value)] for name, value in found if name != "quantity"}


@pytest.mark.parametrize(
    ("section", "computed"),
    [(1, section_1(tensor([-0.3, 1.1, 0.1, 0.1]))), (3, section_3()), (4, section_4())],
    ids=["optimum", "mismatch", "tiny net"],
)
def test_the_tables(section: int, computed: dict[str, Any]) -> None:
    shown = rows(section)
    assert shown.keys() == computed.keys()
    for name, numbers in shown.items():
        value = computed[name]
        expected = value.detach().flatten().numpy() if isinstance(value, Tensor) else [value]
        np.testing.assert_allclose(numbers, expected, rtol=0, atol=1e-6, err_msg=name)


def test_no_other_decimal_stands_on_the_page() -> None:
    """Decimals in prose and reasons are among those of the tables, or are checked by the sums below."""
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    text = re.sub(r"arXiv \d+\.\d+", "", text)
    known = {abs(number) for section in (1, 3, 4) for numbers in rows(section).values() for number in numbers}
    sums = {0.5 + 0.4: 0.9, 0.25 + 0.4: 0.65, 1 / 4: 0.25, 1 - 0.2: 0.8}
    assert all(computed == pytest.approx(shown) for computed, shown in sums.items())
    used = {float(n) for n in re.findall(r"\d+\.\d+", text)}
    assert used <= known | set(sums.values()) | {1.0}
