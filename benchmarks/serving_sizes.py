"""What a page holds, and how many users fit a server's cards: computed from the layout, nothing is measured.

    python benchmarks/serving_sizes.py

Prints two tables of docs/serving.md. A card is filled as vLLM fills it by default, and every user has all of the context at once.
"""

from dataclasses import dataclass

import torch
from shapes import SHAPES
from transformers import AutoModelForCausalLM, PretrainedConfig

from spectralquant.cache.hf import coded_layer_indices
from spectralquant.codec.budget import plane_counts
from spectralquant.codec.layout import UNIT, RecordLayout
from spectralquant.config import Dials
from spectralquant.integrations.vllm.options import Options
from spectralquant.memory import largest
from spectralquant.paged.layout import PageLayout
from spectralquant.paged.recent import copies_for
from spectralquant.sizing import nominal_profile, planner_for

CARD = 80 * 10**9
USED = 0.9
"""Of a card, what vLLM takes (`--gpu-memory-utilization`)."""
ACTIVATIONS = 2 * 10**9
"""Put aside on every card for what a step computes."""
CONTEXTS = (8_192, 32_768, 131_072)
SERVERS = (("Llama-3.1-8B", 1), ("Llama-3.1-70B", 2), ("Llama-3.1-70B", 4), ("Llama-3.1-70B", 8))
"""Model, and cards that share its heads."""
CACHES = ("FP16", "FP8", "high")
OPTIONS = Options(preset="high")
MOST = 1 << 20
"""Where the search for users ends."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What one card holds of a model.

    Attributes:
        weights, constants: Bytes of the model in 16 bits, and of the codec.
        layers: Of the model, all of them packed.
        layout: Of a page of one layer, with this card's heads.
    """

    weights: int
    constants: int
    layers: int
    layout: PageLayout

    @classmethod
    def of(cls, config: PretrainedConfig, cards: int) -> "Rank":
        """One of `cards` that share every layer of a model of this shape."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        coded = coded_layer_indices(model)
        profile = nominal_profile(model, coded)
        layer = profile.layers[coded[0]]
        record = RecordLayout(*plane_counts(profile, OPTIONS.compression, Dials()))
        planner = planner_for(model, OPTIONS.compression, element_bytes=2)
        return cls(
            planner.weights // cards, planner.codec // cards, len(coded), PageLayout(record, layer.heads // cards, layer.head_dim, OPTIONS.exact_per_page)
        )

    @property
    def vector_bytes(self) -> int:
        """Of a token's keys and values in 16 bits."""
        return 2 * 2 * self.layout.heads * self.layout.head_dim

    def cache_bytes(self, cache: str, users: int, context: int) -> int:
        """Of so many users' tokens, with the exact copies that `users` need."""
        if cache == "high":
            pages = users * -(-context // UNIT) * self.layout.page_bytes
            copies = (copies_for(users) + 1) * UNIT * self.vector_bytes  # one more, for what needs none
            return self.layers * (pages + copies) + self.constants
        return self.layers * users * context * self.vector_bytes // (1 if cache == "FP16" else 2)

    def most_users(self, cache: str, context: int) -> int:
        room = int(USED * CARD) - ACTIVATIONS - self.weights
        return largest(lambda users: self.cache_bytes(cache, users, context) <= room, MOST)


def table_of_a_page() -> list[list[str]]:
    """Rows with a head: the parts of a page of Llama-3.1-8B on one card, in their order."""
    layout = Rank.of(SHAPES["llama-3.1-8b"], 1).layout
    end = layout.places_begin + layout.exact
    parts = {
        "records: codes and gains, one record per KV head": layout.records_bytes,
        "keys of tokens that stand apart": layout.exact_bytes,
        "values of tokens that stand apart": layout.exact_bytes,
        "serial number": layout.exponents_begin - layout.serial_begin,
        "powers of two of these tokens": layout.places_begin - layout.exponents_begin,
        "places of these tokens": layout.exact,
        "padding": layout.page_bytes - end,
        "page": layout.page_bytes,
        "the same tokens in 16 bits": UNIT * 2 * 2 * layout.heads * layout.head_dim,
    }
    return [["part of a page", "bytes"], *([name, f"{count:,}"] for name, count in parts.items())]


def table_of_users() -> list[list[str]]:
    """Rows with a head: users by server, context and cache."""
    rows = [["model", "cards", "tokens of each user", "FP16", "FP8", "`high`"]]
    for model, cards in SERVERS:
        rank = Rank.of(SHAPES[model.lower()], cards)
        rows += [[model, str(cards), f"{context:,}", *(f"{rank.most_users(cache, context):,}" for cache in CACHES)] for context in CONTEXTS]
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


if __name__ == "__main__":
    print(as_markdown(table_of_a_page()), as_markdown(table_of_users()), sep="\n\n")
