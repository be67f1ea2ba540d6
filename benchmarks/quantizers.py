"""Squared error of the quantizers on Gaussian coordinates with a model's spectra, beside the rate-distortion bound.

    python benchmarks/quantizers.py --calibration my-model --out result.json

Errors are shares of the whole variance, mean over all heads of all layers. The bound is reverse water-filling (Cover & Thomas, 10.3.3).
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from calibration import command_line

from spectralquant.allocation import water_fill
from spectralquant.codec.joint import JointPlanes, block_index, fit_codebooks
from spectralquant.codec.quantizer import SCALAR_WIDTHS, build_quantizer
from spectralquant.profile import load_profile

SAMPLES = 2000


def bound(variance, bits):
    """Least error of any code of `bits` bits for each row of variances [N, D], summed: min(variance, level), the level by bisection."""
    low, high = torch.full_like(variance[:, :1], 1e-15), variance[:, :1].clone()
    for _ in range(100):
        level = (low * high).sqrt()
        above = (0.5 * (variance / level).clamp_min(1).log2()).sum(-1, keepdim=True) > bits
        low, high = torch.where(above, level, low), torch.where(above, high, level)
    return torch.minimum(variance, high).sum(-1)


def error(quantizer, variance):
    """Mean over samples of sum variance (u - levels)^2, [N], for `quantizer` over N heads."""
    generator = torch.Generator().manual_seed(1)
    u = torch.randn((1, len(variance), SAMPLES, variance.shape[1]), generator=generator)
    return ((u - quantizer.quantize(u)[1]).square().mean((0, 2)).double() * variance).sum(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--bits", type=float, action="append", help="bits per element; default 2.0, 2.5 and 3.0")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    profile = load_profile(args.calibration)
    result = {
        "command": command_line("quantizers", sys.argv[1:]),
        "model": profile.model,
        "versions": {"torch": version("torch")},
        "rows": [],
    }
    for side in ("key", "value"):
        variance = torch.cat([getattr(layer, side).variance for layer in profile.layers.values()]).double()
        for bits in args.bits or (2.0, 2.5, 3.0):
            planes = round(variance.shape[1] * bits / 32) * 16
            total = variance.sum(-1)
            row = {"side": side, "bits": 2 * planes / variance.shape[1], "bound": float((bound(variance, 2 * planes) / total).mean())}
            for name, widths in SCALAR_WIDTHS.items():
                made = build_quantizer(water_fill(variance, 2 * planes, widths, name), name, torch.device("cpu"))
                row[name] = float((error(made, variance) / total).mean())
            joint = JointPlanes(fit_codebooks(variance, planes), variance.sqrt().float(), variance > 0, block_index(variance.shape[1]))
            row["joint"] = float((error(joint, variance) / total).mean())
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
