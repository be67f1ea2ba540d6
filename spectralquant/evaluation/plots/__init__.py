"""Pictures of a run: error against size, error against context length, needles by depth.

Methods of 16 bits are left out of the pictures of KL where there are others: their error is that of rounding, and decades of empty axis would
press everything else together. A line below the picture gives it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from spectralquant.evaluation.plots.agreement_by_depth import draw_agreement_by_depth
from spectralquant.evaluation.plots.kl_against_bits import draw_kl_against_bits
from spectralquant.evaluation.plots.kl_by_context import draw_kl_by_context
from spectralquant.evaluation.plots.style import DPI, require_matplotlib, settings

if TYPE_CHECKING:
    from spectralquant.evaluation.report import RunReport

PICTURES = {"kl_against_bits": draw_kl_against_bits, "kl_by_context": draw_kl_by_context, "agreement_by_depth": draw_agreement_by_depth}
"""File name -> what draws it; None where a report has no figures for it."""


def write_plots(report: "RunReport", folder: Path) -> list[Path]:
    """Draw what the report has figures for, as PNG files in `folder`; returns their paths.

    `kl_against_bits.png`: mean KL against all-in bits, averaged over texts, a panel per context. `kl_by_context.png`: KL against context length, a
    panel per text, for two contexts or more. `agreement_by_depth.png`: share of needles found, methods by depth, a panel per length.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    written: list[Path] = []
    for name, draw in PICTURES.items():
        with settings():
            figure = draw(report)
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=DPI)
                written.append(path)
    return written
