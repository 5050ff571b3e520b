from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def available_isas() -> list[str]: ...

class Engine:
    def __init__(
        self,
        input_shape: Sequence[int],
        ops: list[dict[str, Any]],
        tensors: list[dict[str, npt.NDArray[Any]]],
        threads: int,
    ) -> None: ...
    def run(self, images: npt.NDArray[np.float32], seconds: list[float] | None = None) -> npt.NDArray[np.float32]: ...
    def run_op(self, index: int, inputs: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
