"""A conversation in one compressed cache: every turn reads the new tokens alone, whatever was said before is codes by now."""

import time
from typing import Any

import torch

from spectralquant import prompts
from spectralquant.cache.hf import SpectralCache, model_device
from spectralquant.compat import cache_argument
from spectralquant.config import require_int
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError


class Conversation:
    """Turns of a user and a model.

    Args:
        engine: Holds the model's calibration, see `SpectralQuantEngine.ensure_calibrated`.
        model, tokenizer: The tokenizer has a chat template.
        system: A system message, or None for what the template says by itself.

    Attributes:
        messages: What was said so far, [{"role":, "content":}, ...].
        cache: What the model remembers.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """

    def __init__(self, engine: SpectralQuantEngine, model: Any, tokenizer: Any, system: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("this model's tokenizer has no chat template, it was not made for conversations; use generate")
        self._engine, self._model, self._tokenizer = engine, model, tokenizer
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: list[dict[str, str]] = list(self._opening)
        self.cache: SpectralCache = self._engine.cache(self._model)
        self._held: list[int] = []

    def reply(self, text: str, max_new_tokens: int = 512, **generation: Any) -> dict[str, Any]:
        """The model's answer to `text`. A turn that fails or is interrupted leaves the conversation as it was before.

        Args:
            text: What the user says.
            max_new_tokens: Of the answer, at most.
            **generation: Options of transformers' `generate`, `streamer` included.

        Returns:
            {text, new_tokens, read_tokens, seconds, tokens_per_second} and `stats`; read_tokens of the prompt went through the model, the others were
            remembered.
        """
        if not text.strip():
            raise ConfigError("the message is empty; expected some text")
        count, asked = require_int("max_new_tokens", max_new_tokens, 1), [*self.messages, {"role": "user", "content": text}]
        ids = prompts.encode(self._tokenizer, asked, True, model_device(self._model)).ids
        remembered = self._remember(ids[0].tolist())
        began = time.perf_counter()
        options = prompts.with_pad_token(self._model, self._tokenizer, {**generation, **cache_argument(self._model, self.cache)})
        try:
            out = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
        except BaseException:
            self.cache.roll_back(remembered)
            self._held = self._held[: self.cache.get_seq_length()]
            raise
        sequence, seconds = out[0].tolist(), time.perf_counter() - began
        new = sequence[ids.shape[1] :]
        answer = self._tokenizer.decode(new, skip_special_tokens=True)
        self._held, self.messages = sequence[: self.cache.get_seq_length()], [*asked, {"role": "assistant", "content": answer}]
        rate = len(new) / seconds
        turn = {"text": answer, "new_tokens": len(new), "read_tokens": ids.shape[1] - remembered, "seconds": seconds, "tokens_per_second": rate}
        return {**turn, **self.stats()}

    def stats(self) -> dict[str, Any]:
        """{turns, seq_len, compressed_bytes, fp16_bytes, ratio, codec_bytes, preset}: sizes of what is remembered, in bytes as allocated."""
        held = self.cache.nbytes
        return {
            "turns": sum(message["role"] == "assistant" for message in self.messages),
            "seq_len": self.cache.get_seq_length(),
            "compressed_bytes": held,
            "fp16_bytes": self.cache.dense_bytes,
            "ratio": self.cache.dense_bytes / held if held else 1.0,
            "codec_bytes": self.cache.codec_bytes,
            "preset": self._engine.preset.name,
        }

    def _remember(self, ids: list[int]) -> int:
        """Go back to what the cache shares with `ids` (templates may write an answer differently from how it came); returns its length."""
        same = next((i for i, (a, b) in enumerate(zip(self._held, ids, strict=False)) if a != b), min(len(self._held), len(ids)))
        same = min(same, len(ids) - 1)  # the model has to read something
        if same < self.cache.get_seq_length():
            self.cache.roll_back(same)
        self._held = self._held[: self.cache.get_seq_length()]
        return len(self._held)
