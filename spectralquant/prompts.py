"""Prompts in every form people have them -> token ids, and back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralquant.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Inputs:
    """ids [B, T] int64, left-padded; mask [B, T] int64, 1 where a token is; batched: the caller gave several prompts."""

    ids: Tensor
    mask: Tensor
    batched: bool


def encode(tokenizer: Any, prompt: Any, add_special_tokens: bool, device: torch.device) -> Inputs:
    """Token ids of a string, a list of strings, chat messages, a list of chats, token ids, or a tensor of them.

    Raises:
        ConfigError: The prompt is empty or of no known form.
    """
    rows, batched = _rows(tokenizer, prompt, add_special_tokens)
    empty = [i for i, row in enumerate(rows) if not row]
    if not rows or empty:
        raise ConfigError(f"prompt{'' if not batched else empty} is empty; expected at least one token")
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return Inputs(ids, mask, batched)


def _rows(tokenizer: Any, prompt: Any, special: bool) -> tuple[list[list[int]], bool]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist() if prompt.dim() == 1 else [row.tolist() for row in prompt]
        return ([prompt], False) if not prompt or isinstance(prompt[0], int) else (prompt, len(prompt) > 1)
    if isinstance(prompt, str):
        return [_text(tokenizer, prompt, special)], False
    if isinstance(prompt, (list, tuple)) and prompt:
        kinds = {type(item) for item in prompt}
        if kinds == {int}:
            return [list(prompt)], False
        if kinds == {str}:
            return [_text(tokenizer, text, special) for text in prompt], True
        if kinds == {dict}:
            return [_chat(tokenizer, prompt)], False
        if kinds == {list}:
            return [_rows(tokenizer, item, special)[0][0] for item in prompt], True
    if isinstance(prompt, (list, tuple)) and not prompt:
        return [], False
    raise ConfigError(
        f'prompt is a {type(prompt).__name__}; expected a string, a list of strings, chat messages ([{{"role": "user", "content": "..."}}]), or token ids'
    )


def _text(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"]) if text else []


def _chat(tokenizer: Any, messages: Any) -> list[int]:
    bad = next((m for m in messages if not {"role", "content"} <= m.keys()), None)
    if bad is not None:
        raise ConfigError(f"chat message {bad!r:.80} needs the keys 'role' and 'content'")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return _text(tokenizer, text, False)


def as_message(tokenizer: Any, text: str) -> Any:
    """`text` as a user's message where the tokenizer knows how chats are written, else as it is."""
    return [{"role": "user", "content": text}] if getattr(tokenizer, "chat_template", None) else text


def with_pad_token(model: Any, tokenizer: Any, generation: dict[str, Any]) -> dict[str, Any]:
    """`generation` with a pad token for models whose configuration names none (transformers warns at every call otherwise)."""
    if model.generation_config.pad_token_id is not None or "pad_token_id" in generation:
        return generation
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return generation if pad is None else {**generation, "pad_token_id": pad}


def strip_padding(row: Tensor, tokenizer: Any) -> list[int]:
    """Generated ids of one row without the padding behind its end-of-text token."""
    tokens = row.tolist()
    eos = tokenizer.eos_token_id
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
