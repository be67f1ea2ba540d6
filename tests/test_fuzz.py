"""Mutated files, a hundred for each reader; `benchmarks/fuzz.py` tries a hundred thousand. hypothesis chooses the mutations, and shrinks what fails."""

import importlib
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES, FEW = 100, 3
READERS = (
    "calibration", "calibration, header alone", "calibration of an encoder", "original package, tensors", "original package, meta", "model, weights",
    "model, index", "model, config.json", "run, rows", "run, configuration", "page, rows", "page, bench", "text, JSON lines", "word problems",
    "cache", "cache, sliding window", "store, block", "store, block in fewer bytes", "store, tail", "archive model", "archive",
)  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Any:
    """`fuzz`, `fuzz_mutations` and `fuzz_readers`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in ("fuzz", "fuzz_mutations", "fuzz_readers")}


def test_every_reader_is_tried(scripts: Any) -> None:
    assert tuple(scripts["fuzz_readers"].READERS) == READERS


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_as_they_were_or_refused(scripts: Any, tmp_path: Path, name: str) -> None:
    """Neither another error, nor other content under a checksum; what is valid after the mutation can be used."""
    reader = scripts["fuzz_readers"].READERS[name]
    path = reader.make(tmp_path)
    original, want = path.read_bytes(), reader.read(path)
    reader.use(want)

    @settings(max_examples=FEW if reader.slow else FILES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=False), blind=st.booleans())
    def check(random: Random, blind: bool) -> None:
        data = random.choice(scripts["fuzz_mutations"].BLIND if blind else reader.aware)(random, original)
        outcome = scripts["fuzz"].tried(reader, path, original, want, data, blind)
        assert outcome in ("same", "other") or outcome.startswith("refused ")

    check()


def test_what_would_be_a_failure_is_one(scripts: Any, tmp_path: Path) -> None:
    """The harness sees an uncaught error, content that changed under a checksum, and a file that is refused because memory ran out."""
    tried, reader_type = scripts["fuzz"].tried, scripts["fuzz_readers"].Reader
    from spectralquant.errors import ProfileError

    path = tmp_path / "file"
    path.write_bytes(b"valid")

    def too_much(_: Path) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ProfileError("refused") from error

    def reader(read: Any, **options: Any) -> Any:
        return reader_type("test", lambda folder: path, read, lambda a, b: a == b, (), **options)

    with pytest.raises(ValueError, match="invalid literal"):
        tried(reader(lambda p: int(p.read_bytes())), path, b"valid", b"valid", b"x", False)
    with pytest.raises(AssertionError, match="its content changed"):
        tried(reader(Path.read_bytes, sealed=True), path, b"valid", b"valid", b"x", True)
    with pytest.raises(AssertionError, match="too much memory"):
        tried(reader(too_much), path, b"valid", b"valid", b"x", True)
    assert tried(reader(Path.read_bytes), path, b"valid", b"valid", b"x", True) == "other"
    assert tried(reader(Path.read_bytes, sealed=True), path, b"valid", b"valid", b"valid", True) == "same"
