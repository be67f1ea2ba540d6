"""Random programs of `generate`, see `generate_machine`; `benchmarks/state_machine.py` runs many more."""

import pytest
from generate_machine import GenerateMachine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from near_lossless import Pair

SHORT = settings(max_examples=8, stateful_step_count=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_random_programs(llama_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerateMachine, "pair", llama_pair, raising=False)
    run_state_machine_as_test(GenerateMachine, settings=SHORT)
