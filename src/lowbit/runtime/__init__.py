"""Running a packed file: the native engine and the images that it is given. Needs NumPy and Pillow, no torch."""

from lowbit.runtime.engine import Engine, instruction_sets, kernels_of, peak
from lowbit.runtime.images import load_image

__all__ = ["Engine", "instruction_sets", "kernels_of", "load_image", "peak"]
