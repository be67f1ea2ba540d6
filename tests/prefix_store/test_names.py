import torch

from spectralquant.cache.file import Identity
from spectralquant.codec.layout import UNIT
from spectralquant.config import CacheConfig
from spectralquant.prefix_store.names import NAME, block_names, root_name

IDENTITY = Identity("w" * 32, "float32", "c" * 32)


def test_texts_that_begin_alike_have_the_same_first_names() -> None:
    """And never one more, whatever comes behind."""
    root, text = root_name(IDENTITY, CacheConfig()), torch.randint(0, 50_000, (2000,))
    names = block_names(root, text)
    assert len(names) == 2000 // UNIT and len(set(names)) == len(names) and all(NAME.fullmatch(name) for name in names)
    for same in (0, 1, UNIT - 1, UNIT, 700, 1999, 2000):
        other = torch.cat([text[:same], text[same : same + 1] + 1, text[same:]])
        common = [a == b for a, b in zip(names, block_names(root, other), strict=False)]
        assert common == [True] * (same // UNIT) + [False] * (len(common) - same // UNIT)


def test_whatever_codes_depend_on_is_in_the_root() -> None:
    others = [Identity("v" * 32, "float32", "c" * 32), Identity("w" * 32, "bfloat16", "c" * 32), Identity("w" * 32, "float32", "d" * 32)]
    configs = [CacheConfig(sinks=5), CacheConfig(window=256), CacheConfig(max_exact_share=0.01)]
    roots = {root_name(IDENTITY, CacheConfig())} | {root_name(i, CacheConfig()) for i in others} | {root_name(IDENTITY, c) for c in configs}
    assert len(roots) == 7
    assert root_name(IDENTITY, CacheConfig(backend="reference", tile_tokens=512)) in roots, "how codes are read doesn't matter"


def test_names_stay_what_they_are() -> None:
    """Stores outlive releases: a change of names makes all entries useless without a word."""
    root = root_name(IDENTITY, CacheConfig())
    assert root == "3e932c57596011454e2a4a3e1c6499c199c6cba6"
    assert block_names(root, torch.arange(UNIT)) == ["10a6f418bc1c92ebc5e17e00935cb51af2a962d7"]
