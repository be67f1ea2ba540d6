"""Draws the pictures of docs/images that explain: what is rotated, how water is filled, what is stored, how the whole cache shrinks, how the code is layered.

    python docs/figures.py --calibration smollm2.safetensors

These but the last are computed from SmolLM2-135M-Instruct (the `demo` extra), this calibration of it and a text of the bundled corpus. `--only architecture`
draws the last alone, from .importlinter, and `--only archive` the curves of docs/archive.md, from benchmarks/results; they need neither.
"""

import argparse
import configparser
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from torch import Tensor

from spectralquant import PRESETS, SpectralQuantEngine, get_default_calibration_texts
from spectralquant.cache.segment import Segment
from spectralquant.codebook import distortion_table
from spectralquant.codec.budget import coordinate_bits
from spectralquant.codec.layout import UNIT
from spectralquant.compat import cache_argument
from spectralquant.presets import BIT_WIDTHS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
ARCHIVES = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M", "qwen": "Qwen2.5-Coder-1.5B"}
"""Result file of archives -> model."""
BLUE, ORANGE, GREEN, GREY, PURPLE = "#3366aa", "#dd7722", "#3a9d5d", "#888888", "#8855aa"
WIDTH_COLOURS = {0: "#cccccc", 2: "#9ecae1", 4: "#4a90c4", 6: "#08519c", 8: "#4a148c"}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5, "svg.fonttype": "none", "svg.hashsalt": "docs"}
LAYER, HEAD, TOKENS = 8, 0, 1024
"""Which head is drawn: one in the middle of the model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", help="calibration file of SmolLM2-135M-Instruct")
    parser.add_argument("--only", choices=["architecture", "archive"], help="draw just this one")
    args = parser.parse_args()
    with rc_context(STYLE):
        if args.only != "archive":
            draw_architecture(IMAGES / "architecture.svg")
        if args.only != "architecture":
            draw_archive(IMAGES / "archive.svg")
        if args.only:
            return
        if args.calibration is None:
            parser.error("--calibration is missing: a file made by `spectralquant calibrate smollm2 --out FILE`")
        from spectralquant.cli.models import load_model

        model, tokenizer, _ = load_model(None)
        engine = SpectralQuantEngine(compression="high")
        engine.load_calibration(args.calibration)
        ids = tokenizer("\n\n".join(get_default_calibration_texts()), return_tensors="pt")["input_ids"][:, :TOKENS]
        segment = read_text(engine, model, ids)
        draw_rotated(engine, model, ids, segment, IMAGES / "rotated.png")
        draw_water(engine, model, IMAGES / "water.png")
        draw_stored(engine, segment, IMAGES / "stored.png")
        draw_whole_cache(args.calibration, model, IMAGES / "whole-cache.png")


def read_text(engine: SpectralQuantEngine, model: Any, ids: Tensor) -> Segment:
    """One layer's store, with all but the window of `ids` packed."""
    cache = engine.cache(model)
    with torch.no_grad():
        for piece in (ids, ids[:, :1]):  # blocks leave the window when an update begins
            model(piece, use_cache=True, **cache_argument(model, cache))
    engine.remove_from(model)
    segment = cache.coded_layers[LAYER].segment
    if segment is None:
        raise SystemExit("the text left nothing in the cache")
    return segment


def draw_rotated(engine: SpectralQuantEngine, model: Any, ids: Tensor, segment: Segment, path: Path) -> None:
    """Keys of one head as the model caches them, turned back inside their run, and in the coordinates that are coded."""
    codec = engine.profile_codec(model)[LAYER]
    with torch.no_grad():
        keys = model(ids, use_cache=True).past_key_values.layers[LAYER].keys.float()
    slots, start = torch.arange(keys.shape[2]), torch.zeros(1, dtype=torch.int64)
    keep = ~torch.isin(slots, segment.exact_slots[0])  # tokens that stay exact lie far off
    turned = codec.centre_keys(keys, slots, start)[0, HEAD][keep]
    coded = turned @ codec.key.encode_matrix[HEAD] * codec.key.scale[HEAD]
    stored = keys[0, HEAD][keep]
    half = stored.shape[1] // 2
    by_position = stored.var(0) - turned.var(0)
    pair = int((by_position[:half] + by_position[half:]).argmax())
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(2, 3, height_ratios=[1.35, 1])
    titles = ["as the model caches them", "turned back by the run's position,\nmean taken off", "in the coordinates that are coded"]
    places = [(stored[:, pair], stored[:, pair + half]), (turned[:, pair], turned[:, pair + half]), (coded[:, 0], coded[:, 1])]
    names = [(pair, pair + half), (pair, pair + half), (0, 1)]
    for axes, title, (x, y), (first, second) in zip(grid[0], titles, places, names, strict=True):
        points = axes.scatter(x, y, c=slots[keep], s=7, cmap="viridis", linewidths=0)
        reach = 1.08 * float((coded if x is places[2][0] else stored)[:, [first, second]].abs().max())
        axes.set(title=title, xlabel=f"coordinate {first}", ylabel=f"coordinate {second}", aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    figure.colorbar(points, ax=grid[0], label="position of the token", shrink=0.8)
    spread = [values.var(0) for values in (stored, turned, coded)]
    for axes, variance, colour in zip(grid[1], spread, (GREY, BLUE, ORANGE), strict=True):
        axes.bar(range(len(variance)), variance if variance is not spread[2] else 100 * variance / variance.sum(), color=colour, width=0.9)
        axes.set(xlabel="coordinate", ylabel="variance", ylim=(0, 1.3 * float(spread[0].max())))
    whole, rest = float(spread[0].sum()), float(spread[1].sum())
    most = int((spread[2].sort(descending=True).values.cumsum(0) < 0.9 * spread[2].sum()).sum()) + 1
    grid[1][2].set(ylabel="% of what attention feels", ylim=(0, 108 * float(spread[2].max() / spread[2].sum())))
    notes = [f"{whole:.0f} in all", f"{rest:.0f} in all:\n{1 - rest / whole:.0%} was position", f"{most} of {len(variance)} coordinates\nhold 90 %"]
    for axes, note in zip(grid[1], notes, strict=True):
        axes.text(0.97, 0.97, note, transform=axes.transAxes, ha="right", va="top")
    figure.savefig(path, dpi=130)


def draw_water(engine: SpectralQuantEngine, model: Any, path: Path) -> None:
    """The spectrum of two heads, the width that each coordinate gets, and the error that is left."""
    profile, codec = engine.profile_of(model), engine.profile_codec(model)
    planes = codec[LAYER].layout.key_planes
    spectra = {i: layer.key.variance for i, layer in profile.layers.items()}
    table = torch.tensor(distortion_table(BIT_WIDTHS), dtype=torch.float64)
    share = {(i, h): float(v[h, :4].sum() / v[h].sum()) for i, v in spectra.items() for h in range(len(v))}
    chosen = [max(share, key=share.__getitem__), min(share, key=share.__getitem__)]
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    for axes, (index, head), kind in zip(figure.subplots(1, 2), chosen, ("concentrated", "even"), strict=True):
        variance = spectra[index][head : head + 1].double()
        bits = coordinate_bits(variance, planes, engine.dials, engine.preset, "key")[0]
        left = variance[0] * table[bits // 2]
        axes.bar(range(len(bits)), variance[0], color=[WIDTH_COLOURS[int(b)] for b in bits], width=0.9)
        axes.step([x - 0.5 for x in range(len(bits) + 1)], [*left.tolist(), float(left[-1])], where="post", color=ORANGE, linewidth=1.8)
        axes.set(
            yscale="log", ylim=(float(left.min()) / 2, float(variance.max()) * 2), xlabel="coordinate, by variance", ylabel="variance, as attention feels it"
        )
        axes.set_title(f"the most {kind} spectrum: keys of layer {index}, head {head}")
    used = [Patch(color=colour, label=f"{width} bits" if width else "dropped") for width, colour in WIDTH_COLOURS.items()]
    figure.legend(handles=[*used, Patch(color=ORANGE, label="error left after coding")], loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=130)


def draw_stored(engine: SpectralQuantEngine, segment: Segment, path: Path) -> None:
    """What a token and head takes, and where the tokens of one layer are."""
    layout, dim = segment.codec.layout, segment.codec.head_dim
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1.25, 1])
    rows = {
        "16 bits": [(2 * dim, "K", GREY), (2 * dim, "V", "#aaaaaa")],
        "packed, high": [(layout.key_planes // 4, "K codes", BLUE), (1, "", ORANGE), (layout.value_planes // 4, "V codes", GREEN), (1, "", ORANGE)],
    }
    for y, parts in zip((1, 0), rows.values(), strict=True):
        x = 0
        for size, label, colour in parts:
            above.add_patch(Rectangle((x, y - 0.35), size, 0.7, color=colour, linewidth=0))
            if label:
                above.text(x + size / 2, y, f"{label}\n{size} B", ha="center", va="center", color="white", fontsize=9)
            x += size
        above.text(x + 2, y, f"{x} bytes" + (" (two gains of 1 byte in orange)" if y == 0 else ""), va="center")
    above.set(
        xlim=(0, 4 * dim * 1.12), ylim=(-0.6, 1.6), yticks=[0, 1], yticklabels=["packed,\nhigh", "16 bits"], xlabel="bytes of one token and head (head size 64)"
    )
    slots = segment.exact_slots[0]
    slots = slots[slots >= 0]
    for unit in range(segment.packed // UNIT):
        below.add_patch(Rectangle((unit * UNIT + 1, 0), UNIT - 2, 1, color=BLUE, alpha=0.75, linewidth=0))
        below.text((unit + 0.5) * UNIT, 0.5, f"unit {unit}", ha="center", va="center", color="white", zorder=5)
    below.add_patch(Rectangle((segment.packed, 0), segment.recent, 1, color=GREY, linewidth=0))
    below.text(segment.packed + segment.recent / 2, 0.5, f"window\n{segment.recent} tokens", ha="center", va="center", color="white")
    sinks = slots < engine.cache_config.sinks
    below.vlines(slots[~sinks], 0, 1.12, color=ORANGE, linewidth=1.4, label=f"{int((~sinks).sum())} tokens in mid-text that stay exact")
    below.vlines(slots[sinks], 0, 1.12, color=PURPLE, linewidth=2.2, label=f"the first {int(sinks.sum())} tokens (attention sinks), exact")
    below.set(xlim=(-4, segment.length + 4), ylim=(0, 1.15), yticks=[], xlabel=f"token ({segment.length} tokens, layer {LAYER})")
    below.spines["left"].set_visible(False)
    below.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def draw_whole_cache(calibration: str, model: Any, path: Path) -> None:
    """The whole cache as allocated against 16 bits, over the context."""
    contexts = [2**i for i in range(7, 18)]
    contexts = sorted({*contexts, *(3 * c // 2 for c in contexts[:-1])})
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(PRESETS, (GREEN, BLUE, PURPLE, ORANGE), strict=True):
        engine = SpectralQuantEngine(compression=name)
        engine.load_calibration(calibration)
        axes.plot(contexts, [engine.memory_plan(model, 1, n).ratio for n in contexts], color=colour, label=name, marker="o", markersize=3)
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xscale("log", base=2)
    shown = [128, 512, 2048, 8192, 32768, 131072]
    axes.set_xticks(shown, [f"{n:,}" for n in shown])
    axes.set(xlabel="tokens in the cache", ylabel="times smaller than 16 bits", title="the whole cache as allocated, SmolLM2-135M, one sequence")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


MEANINGS = {
    "cli": "the command line",
    "evaluation": "quality beside peers, reports",
    "integrations": "encoders, vLLM, language models elsewhere",
    "api": "SpectralQuant",
    "conversation": "turns in one cache",
    "sizing": "what fits where",
    "engine": "SpectralQuantEngine",
    "application": "makes a model read codes",
    "model_folder": "a model's calibration, without its weights",
    "cache_figures": "stats",
    "calibration_cache": "measured once per machine",
    "pretrained": "a folder with a card",
    "spectra": "spectra in figures",
    "selection": "the menu",
    "follow_up": "a prefix for many",
    "prompts": "text to ids",
    "clock": "who takes the time",
    "memory": "bytes, beforehand",
    "heads": "the original's heads",
    "original_format": "the original's files",
    "decode_graph": "a step as a CUDA graph",
    "generation_options": "what generate was asked for",
    "prefix_store": "prefixes for every process",
    "cold": "prefixes put away",
    "cuda_graphs": "capture and replay",
    "paged": "a cache in pages, for servers",
    "calibration": "measures a model",
    "cache": "holds the tokens",
    "attention": "reads the codes",
    "archive": "codes for storage",
    "codec": "encodes and decodes; the bit layout",
    "profile": "what calibration hands to the codec",
    "profile_format": "what its files may hold",
    "allocation": "fills water",
    "corpus": "texts",
    "codebook": "levels of a quantizer",
    "rope": "rotary embedding",
    "backend": "PyTorch or CUDA, and why",
    "config": "validated settings",
    "presets": "names for promises",
    "byte_counts": "sizes in words",
    "kernels": "CUDA sources, compiled at first use",
    "compat": "what differs between releases of transformers",
    "requirements": "which releases",
    "tensor_file": "files with a checksum",
    "torch_archive": "torch.save, not unpickled",
    "errors": "what goes wrong",
    "version": "",
    "stopwatch": "time on a device",
    "readback": "numbers to the host",
    "home": "the user's folder",
    "files": "written aside first",
    "terminal": "what can be shown",
    "untrusted": "what strangers write",
}
"""What stands under a name in the picture of the layers."""
TOUCHED, OFFLINE, BETWEEN, ONLINE = "#c9dcf2", "#f7dfc3", "#fff2b3", "#d5ead0"
KINDS = {TOUCHED: "what users call", OFFLINE: "measuring a model", BETWEEN: "its result", ONLINE: "what runs while generating"}
COLOURS = {
    **dict.fromkeys(("cli", "evaluation", "integrations", "api", "conversation", "sizing", "engine"), TOUCHED),
    **dict.fromkeys(("calibration", "selection", "corpus", "calibration_cache"), OFFLINE),
    **dict.fromkeys(("profile", "pretrained"), BETWEEN),
    **dict.fromkeys(("application", "paged", "cache", "attention", "codec", "kernels", "decode_graph", "cuda_graphs", "follow_up"), ONLINE),
}


def draw_archive(path: Path) -> None:
    """KL against the ratio of what is stored, from the result files of benchmarks/archive.py."""
    files = {name: RESULTS / f"archive-{name}.json" for name in ARCHIVES}
    there = {name: json.loads(file.read_text(encoding="utf-8"))["summary"] for name, file in files.items() if file.exists()}
    figure = Figure((4.2 * len(there), 3.6), layout="constrained")
    axes = figure.subplots(1, len(there), squeeze=False)[0]
    for ax, (name, lines) in zip(axes, there.items(), strict=True):
        archives = sorted((x for x in lines if x["method"].startswith("archive")), key=lambda x: x["ratio"])
        for suffix, label, colour in (("", "archive, read as it is", BLUE), (", high", "packed at high after loading", ORANGE)):
            curve = [x for x in archives if x["method"].endswith(", high") == bool(suffix)]
            ax.plot([x["ratio"] for x in curve], [x["kl"] for x in curve], "o-", color=colour, label=label)
        for method, label, colour in (("high", "packed cache, high", GREY), ("lossless", "the same, coded without loss", GREEN)):
            (line,) = (x for x in lines if x["method"] == method)
            ax.plot(
                line["ratio"],
                line["kl"],
                "s",
                color=colour,
                label=label,
                markersize=9 if method == "high" else 5,
                fillstyle="none" if method == "high" else "full",
            )
        ax.set(title=ARCHIVES[name], xlabel="times smaller than 16 bits, all bytes counted", ylabel="KL per token (nats)", yscale="log")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def layers_of(contract: Path) -> list[list[str]]:
    """Modules of every layer, highest first, without the package's name."""
    parser = configparser.ConfigParser()
    parser.read(contract, encoding="utf-8")
    lines = parser["importlinter:contract:flow"]["layers"].split("\n")
    return [[name.strip().removeprefix("spectralquant.") for name in line.split("|")] for line in lines if line.strip()]


def draw_architecture(path: Path) -> None:
    """One line per layer of .importlinter."""
    layers = layers_of(ROOT / ".importlinter")
    figure = Figure(figsize=(11, 0.62 * len(layers)), layout="constrained")
    axes = figure.subplots()
    for row, names in enumerate(layers):
        y, width = len(layers) - row, 10 / len(names)
        size = 10 if len(names) < 5 else 8
        for column, name in enumerate(names):
            x, look = column * width, {"facecolor": COLOURS.get(name, "#eeeeee"), "edgecolor": "#666666", "linewidth": 0.8}
            axes.add_patch(FancyBboxPatch((x + 0.04, y - 0.4), width - 0.08, 0.8, boxstyle="round,pad=0,rounding_size=0.1", **look))
            meaning = MEANINGS.get(name)
            axes.text(x + width / 2, y + (0.14 if meaning else 0), name, ha="center", va="center", fontsize=size, weight="bold")
            axes.text(x + width / 2, y - 0.19, meaning or "", ha="center", va="center", fontsize=size - 1.8, color="#444444")
    figure.legend(handles=[Patch(color=colour, label=label) for colour, label in KINDS.items()], loc="outside lower center", ncols=4, frameon=False)
    axes.annotate("", (-0.25, 0.7), (-0.25, len(layers) + 0.3), arrowprops={"arrowstyle": "-|>", "color": "#666666", "linewidth": 1.5})
    axes.text(-0.38, (len(layers) + 1) / 2, "a layer imports only lower ones", rotation=90, ha="center", va="center", color="#444444")
    axes.set(xlim=(-0.6, 10.05), ylim=(0.4, len(layers) + 0.6))
    axes.axis("off")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
