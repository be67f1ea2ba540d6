"""Mass that coded tokens lack: against its definition, and against Gaussian errors whose mass is known."""

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from spectralquant.calibration.mass import Asked, QueryRecorder, missing_mass
from spectralquant.calibration.recording import RECORDER, recording

W, H, G, N, T, D = 2, 2, 3, 5, 40, 8


def asked(keys: torch.Tensor, softcap: float | None = None, rest: float = 2.0) -> Asked:
    """Random queries that see `keys` [W, H, T, D] and one more key of logit `rest`."""
    queries = torch.randn(W, H, G * N, D)
    return Asked(queries, with_rest(queries, keys, softcap, rest), G, softcap)


def with_rest(queries: Tensor, keys: Tensor, softcap: float | None, rest: float) -> Tensor:
    logits = queries @ keys.mT
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return torch.cat([logits, torch.full((*logits.shape[:-1], 1), rest)], -1).logsumexp(-1)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_missing_mass_is_the_weighted_mean(softcap: float | None) -> None:
    keys, decoded = torch.randn(W, H, T, D), torch.randn(W, H, T, D)
    coded = torch.rand(W, T) < 0.5
    some = asked(keys, softcap)
    got = missing_mass(some, keys, decoded, coded)
    assert got.shape == (H, G)
    for h in range(H):
        for g in range(G):
            above = below = 0.0
            for w in range(W):
                for n in range(g * N, (g + 1) * N):
                    q = some.queries[w, h, n]
                    mass = []
                    for x in (keys, decoded):
                        s = x[w, h][coded[w]] @ q
                        mass.append(float((s if softcap is None else softcap * (s / softcap).tanh()).exp().sum()))
                    share = mass[0] / float(some.seen[w, h, n].exp())
                    above += share * (1 - share) * (torch.tensor(mass[0]) / mass[1]).log().item()
                    below += share * (1 - share)
            assert float(got[h, g]) == pytest.approx(above / below, rel=1e-3, abs=1e-5)


def test_missing_mass_of_gaussian_errors() -> None:
    """k = k^ + e, e ~ N(0, s^2), queries of one length: log E exp(q . e) = s^2 |q|^2 / 2."""
    decoded = torch.randn(W, H, 4000, D)
    keys = decoded + 0.5 * torch.randn_like(decoded)
    some = asked(keys, rest=8.0)
    queries = 1.2 * some.queries / some.queries.norm(dim=-1, keepdim=True)
    got = missing_mass(Asked(queries, with_rest(queries, keys, None, 8.0), G, None), keys, decoded, torch.ones(W, 4000, dtype=torch.bool))
    assert torch.allclose(got, torch.tensor(0.5 * 0.25 * 1.44), atol=0.02)


def test_missing_mass_without_coded_tokens_is_zero() -> None:
    keys = torch.randn(W, H, T, D)
    some = asked(keys)
    none = torch.zeros(W, T, dtype=torch.bool)
    assert torch.equal(missing_mass(some, keys, 2 * keys, none), torch.zeros(H, G))
    one = none.clone()
    one[1, 7:9] = True  # windows without any count for nothing
    alone = Asked(some.queries[1:], some.seen[1:], G, None)
    assert torch.allclose(missing_mass(some, keys, 2 * keys, one), missing_mass(alone, keys[1:], 2 * keys[1:], one[1:]))


def test_query_recorder_sees_what_the_model_does() -> None:
    """Scaled queries, and the log of the sum over all keys in causal order."""
    model, recorder, kept = tiny_model("llama"), QueryRecorder(frozenset({1})), {}

    def look(module, query, key, value, scale, softcap) -> None:
        recorder.attention(module, query, key, value, scale, softcap)
        kept[module.layer_idx] = (query, key, scale)

    with recording(model, look), torch.no_grad():
        model(torch.randint(3, 99, (2, 24)))
    assert recorder.asked.keys() == {1}
    found, (query, key, scale) = recorder.asked[1], kept[1]
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    assert found.groups == groups and found.queries.shape == (2, heads, groups * 24, key.shape[-1])
    for head, group, place in [(0, 0, 0), (1, 1, 23), (0, 1, 11)]:
        q = query[1, head * groups + group, place] * scale
        assert torch.allclose(found.queries[1, head, group * 24 + place], q)
        assert torch.allclose(found.seen[1, head, group * 24 + place], (key[1, head, : place + 1] @ q).logsumexp(-1), atol=1e-5)


def test_recording_restores_the_model() -> None:
    model = tiny_model("llama")
    model.train()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), recording(model, lambda *_: None, lambda *_: None):
        assert model.config._attn_implementation == RECORDER and not model.training
        raise ZeroDivisionError
    assert model.config._attn_implementation == before and model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
