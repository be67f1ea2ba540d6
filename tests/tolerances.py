"""Bounds that tests share, each with the reason for its size."""

import torch

FLOAT32 = 1e-5
"""Relative: one float32 product of a few hundred terms."""
FLOAT64 = 1e-10
"""Relative: float64 throughout, with eigen-decompositions or sums of a few thousand terms."""
EIGEN32 = 1e-3
"""Relative: float64 eigenvectors stored as float32, their products compared with the smallest of the eigenvalues."""
QUADRATURE = 1e-7
"""Absolute: midpoint rule of 480,000 points against a Gaussian integral in closed form; levels are float32."""
GAIN_ROUNDING = 2 ** (1 / 16) * (1 + 1e-4)
"""Ratio: half a step of the 8-bit log gains, 2^(1/8), and float32 rounding."""
DISTORTION = 0.04
"""Relative: sampling error of a few thousand tokens, gain rounding (0.5 %) and the spread of the gain itself."""
CODE_FLIPS = 2e-3
"""Share of planes that float32 rounding may move over a cell boundary when the same token is encoded in another frame."""
ATTENTION = 2e-5
"""Relative RMS of attention: both sides are float32 and differ in the order of sums."""
FLASH = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative RMS of attention whose keys, weights, parts and output are rounded to 16 bits: 2^-11 and 2^-8 at most, each time, and half of that on average."""
