"""The example of every domain, from its command line: as it comes, on a model and files of the user's, and with what it refuses."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_scripts import script

SETTINGS = ["standard", "high", "max", "8 bits"]


@pytest.fixture(params=["images", "video", "proteins", "audio"])
def domain(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def example(domain: str) -> Any:
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    return script(f"encode_{domain}")


def write_inputs(domain: str, example: Any, folder: Path, count: int = 40) -> list[str]:
    """`count` of the example's own inputs as files; the arguments that name them."""
    if domain == "proteins":
        path = folder / "proteins.fasta"
        path.write_text("".join(f">p{i} some protein\n{s[:60]}\n{s[60:]}\n" for i, s in enumerate(example.PROTEINS[:count])))
        assert example.read(path) == list(example.PROTEINS[:count])
        return [f"--fasta={path}"]
    if domain == "audio":
        for i, clip in enumerate(example.glides()[:count]):
            write_wave(folder / f"{i:02}.wav", clip, example.RATE)
        return [f"--clips={folder}"]
    if domain == "images":
        for i, image in enumerate(example.crops()[:count]):
            image.save(folder / f"{i:02}.png")
        return [f"--images={folder}"]
    for i, clip in enumerate(example.moves()[:count]):
        (folder / f"{i:02}").mkdir()
        for j, frame in enumerate(clip):
            frame.save(folder / f"{i:02}" / f"{j:02}.png")
    return [f"--clips={folder}"]


def write_wave(path: Path, clip: np.ndarray, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((clip.clip(-1, 1) * 32_767).astype("<i2").tobytes())


def random_model(domain: str, example: Any) -> tuple[Any, Any]:
    return getattr(example, {"images": "random_vit", "video": "random_videomae", "proteins": "random_esm", "audio": "random_wav2vec2"}[domain])()


def relative_errors(text: str) -> list[float]:
    return [float(line.split("relative error ")[1].split(",")[0].split(" ")[0]) for line in text.splitlines()]


def test_it_runs_as_it_comes(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([]) == 0
    text = capsys.readouterr().out
    assert [line[:8].strip() for line in text.splitlines()] == SETTINGS
    errors = relative_errors(text)
    assert errors[3] < 1e-2 and errors[3] < min(errors[:3])


def test_it_takes_the_users_model_and_files(domain: str, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in random_model(domain, example):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "inputs").mkdir()
    arguments = write_inputs(domain, example, tmp_path / "inputs")
    assert example.main([f"--model={tmp_path / 'model'}", *arguments]) == 0
    assert relative_errors(capsys.readouterr().out)[3] < 1e-2


def test_one_input_is_too_few(domain: str, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(write_inputs(domain, example, tmp_path, 1))
    assert "expected at least 2" in capsys.readouterr().err


def test_too_few_tokens_are_an_error_without_a_traceback(domain: str, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if domain == "proteins":
        (tmp_path / "short.fasta").write_text(">a\nMKV\n>b\nMKV\n")
        arguments = [f"--fasta={tmp_path / 'short.fasta'}"]
    else:
        arguments = write_inputs(domain, example, tmp_path, 2)
    assert example.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"encode_{domain}: ") and "tokens, expected at least" in error


def test_what_is_not_there_is_an_error_without_a_traceback(domain: str, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option = {"images": "--images", "proteins": "--fasta"}.get(domain, "--clips")
    for argument in (f"--model={tmp_path / 'none'}", f"{option}={tmp_path / 'none'}"):
        if domain == "audio" and argument.startswith("--clips"):
            continue  # a folder without WAV files, which is told above
        assert example.main([argument]) == 2
        assert capsys.readouterr().err.startswith(f"encode_{domain}: ")


def test_sound_of_another_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = script("encode_audio")
    write_wave(tmp_path / "a.wav", np.zeros(100), 8000)
    assert example.main([f"--clips={tmp_path}"]) == 2
    assert "8000 Hz, expected 16 bits, 1 channel, 16000 Hz" in capsys.readouterr().err
