"""Random programs on a cache, see `cache_machine`; `benchmarks/state_machine.py` runs many more."""

from cache_machine import CacheMachine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

SHORT = settings(max_examples=40, stateful_step_count=15, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_random_programs() -> None:
    run_state_machine_as_test(CacheMachine, settings=SHORT)
