"""Random programs of `generate` on a cache and its copies: turns, texts taken back, forks, calls that fail. Every answer is the uncompressed model's.

`counts` says what was run.
"""

from collections import Counter
from typing import Any

import torch
from faults import FailingOperations
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from near_lossless import NEAR, Pair, tokens
from torch import Tensor

from spectralquant.cache.hf import SpectralCache
from spectralquant.compat import UNCROPPABLE

LONGEST = 900
WAYS = st.sampled_from([{}, {}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 90}])
WORST = 3 * NEAR
"""Of one step's logits: errors add up where most of a text was made by reading codes."""
counts: Counter[str] = Counter()


class GenerateMachine(RuleBasedStateMachine):
    """`held`: caches, each with the text that it was given so far and that `generate` returned."""

    pair: Pair

    @initialize(rows=st.integers(1, 2), window=st.sampled_from([1, 64, 128]), seed=st.integers(0, 99))
    def begin(self, rows: int, window: int, seed: int) -> None:
        counts["programs"] += 1
        torch.manual_seed(seed)
        self.rows = rows
        self.held: list[tuple[SpectralCache, Tensor]] = [(self.pair.cache(window=window), tokens(20, rows))]
        self.at = 0

    @property
    def cache(self) -> SpectralCache:
        return self.held[self.at][0]

    @property
    def text(self) -> Tensor:
        return self.held[self.at][1]

    def say(self, text: Tensor) -> None:
        self.held[self.at] = (self.cache, text)

    def ask(self, asked: Tensor, new: int, way: dict[str, int]) -> Any:
        """`generate`, with logits. With a mask: left out, transformers hides tokens that are equal to the padding, and answers may hold some."""
        options = {"attention_mask": torch.ones_like(asked), "output_logits": True, "return_dict_in_generate": True}
        return self.pair.generate(asked, self.cache, max_new_tokens=new, **options, **way)

    def check(self, out: Any, width: int) -> None:
        """Answers, from `width` on, are the likeliest tokens by logits that are near the uncompressed model's."""
        got, want = torch.stack(out.logits, 1), self.pair.logits(out.sequences, width)
        assert torch.equal(got.argmax(-1), out.sequences[:, width:])
        error = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert (error < WORST).all(), f"logits are off by {error.max():.3f}"

    @precondition(lambda self: self.text.shape[1] < LONGEST)
    @rule(question=st.one_of(st.integers(1, 8), st.integers(1, 300)), new=st.integers(1, 20), way=WAYS)
    def turn(self, question: int, new: int, way: dict[str, int]) -> None:
        counts["turn"] += 1
        asked = torch.cat([self.text, tokens(question, self.rows)], 1)
        way = {} if self.rows > 1 and "prompt_lookup_num_tokens" in way else way
        out = self.ask(asked, new, way)
        text, width = out.sequences, asked.shape[1]
        beyond = text.shape[1] - width - new  # some releases take all candidates that were right, with any cache
        assert torch.equal(text[:, :width], asked) and 0 <= beyond <= way.get("prompt_lookup_num_tokens", 0)
        self.check(out, width)
        self.say(text)

    @precondition(lambda self: self.cache.get_seq_length())
    @rule(share=st.floats(0, 1), how=st.sampled_from(["crop", "roll_back"]))
    def take_back(self, share: float, how: str) -> None:
        """Some of the text; the next turn goes on from what is left, or from an empty cache. Windows that have slid on refuse, which changes nothing."""
        counts["take_back"] += 1
        length = int(share * self.cache.get_seq_length())
        if how == "roll_back":
            self.cache.roll_back(length)
        elif length < self.cache.get_seq_length():
            try:
                self.cache.crop(length - self.cache.get_seq_length())
            except UNCROPPABLE:
                assert any(self.cache.is_sliding)
                return
        self.say(self.text[:, : max(length, 1)])

    @precondition(lambda self: len(self.held) < 3)
    @rule(follow=st.booleans())
    def fork(self, follow: bool) -> None:
        counts["fork"] += 1
        self.held.append((self.cache.copy(), self.text))
        if follow:
            self.at = len(self.held) - 1

    @precondition(lambda self: len(self.held) > 1)
    @rule(number=st.integers(0, 2))
    def turn_to(self, number: int) -> None:
        counts["turn_to"] += 1
        self.at = number % len(self.held)

    @precondition(lambda self: self.text.shape[1] < LONGEST)
    @rule(question=st.integers(1, 200), n=st.integers(1, 3000), error=st.sampled_from([torch.OutOfMemoryError, KeyboardInterrupt]))
    def turn_that_fails(self, question: int, n: int, error: type[BaseException]) -> None:
        counts["turn_that_fails"] += 1
        asked = torch.cat([self.text, tokens(question, self.rows)], 1)
        try:
            with FailingOperations(n, error):
                self.say(self.ask(asked, 6, {}).sequences)
        except error:
            counts["failed"] += 1

    @invariant()
    def caches_hold_their_texts(self) -> None:
        """All but the last token, or the beginning of it after a text was taken back."""
        for cache, text in getattr(self, "held", ()):
            lengths = {layer.get_seq_length() for layer in cache.layers}
            assert len(lengths) == 1 and lengths.pop() <= text.shape[1]
        counts["checks"] += 1
