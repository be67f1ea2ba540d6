"""Options of transformers' `generate`, where they come from: the call, the configuration that it was given, the model's own."""

from typing import Any

from spectralquant.errors import ConfigError

_OTHER_SEARCH = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "penalty_alpha", "dola_layers", "constraints", "force_words_ids")
"""Options for other loops than greedy search, sampling and beams."""


_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Options for candidates that the model judges."""


def sequences_each(model: Any, generation: dict[str, Any]) -> int:
    """Rows that transformers makes of each prompt: beams, or samples."""
    return max(_number(model, generation, "num_beams"), _number(model, generation, "num_return_sequences"))


def is_assisted(model: Any, generation: dict[str, Any]) -> bool:
    """Whether candidates come from a smaller model, from the text itself, or from the model's first layers."""
    return any(config.get(name) for config in _configurations(model, generation) for name in _ASSISTED)


def prefill_piece(model: Any, generation: dict[str, Any]) -> int | None:
    """Tokens of a prompt that go through the model at a time; None: all."""
    if "prefill_chunk_size" in generation:
        return generation["prefill_chunk_size"]
    return next((config["prefill_chunk_size"] for config in _configurations(model, generation) if config.get("prefill_chunk_size")), None)


def finishing_tokens(model: Any, generation: dict[str, Any]) -> tuple[int, ...]:
    """Ids of tokens that finish a row for sure: those of greedy search and sampling, where nothing but its own end makes a row stop before the others."""
    if any(generation.get(name) for name in _OTHER_SEARCH) or _number(model, generation, "num_beams") > 1:
        return ()
    config = generation.get("generation_config") or model.generation_config
    ends = generation.get("eos_token_id", config.eos_token_id)
    if ends is None:
        return ()
    return tuple(ends.flatten().tolist()) if hasattr(ends, "tolist") else tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)


def last_length(model: Any, generation: dict[str, Any], prompt: int) -> int | None:
    """Tokens that a row has at most when generation ends; None where no option says."""
    for config in _configurations(model, generation)[:2]:
        if config.get("max_new_tokens"):
            return prompt + int(config["max_new_tokens"])
        if config.get("max_length"):
            return int(config["max_length"])
    return None


def _configurations(model: Any, generation: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Where an option is looked for, in this order."""
    return generation, vars(generation.get("generation_config") or model.generation_config), vars(model.generation_config)


def _number(model: Any, generation: dict[str, Any], name: str) -> int:
    own = generation.get("generation_config")
    return generation.get(name) or getattr(own, name, None) or getattr(model.generation_config, name, None) or 1


def sampling_options(temperature: float, top_p: float) -> dict[str, Any]:
    """Options of `generate`: the most likely token each time for a temperature of 0, else sampling.

    Raises:
        ConfigError: One is out of its range.
    """
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature}: expected 0 or more")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: expected a share above 0, at most 1")
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
