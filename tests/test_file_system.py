"""What a file system may do to a reader or a writer: pipes, devices, links, closed folders, full disks."""

import errno
import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

from spectralquant.cli.main import main
from spectralquant.errors import ConfigError, ProfileError
from spectralquant.evaluation.report import build_report
from spectralquant.files import write_text
from spectralquant.model_folder import INDEX, WEIGHTS, fingerprint_of_folder
from spectralquant.original_format import load_original
from spectralquant.pretrained import find_in
from spectralquant.profile import Profile, load_profile


def profile() -> Profile:
    return synthetic.profile(dim=32)


# Pipes and devices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipe that nobody writes to: whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_a_pipe_is_no_calibration(pipe: Path) -> None:
    with pytest.raises(ProfileError, match="is no file"):
        load_profile(pipe)


def test_a_device_is_no_calibration(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ProfileError, match="is no file"):
        load_profile(tmp_path / "p")


def test_a_pipe_is_no_part_of_an_original_pair(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "old.pt")
    (tmp_path / "old_meta.json").write_text("[]")
    with pytest.raises(ProfileError, match="does not exist"):
        load_original(tmp_path / "old")


@pytest.mark.parametrize("name", ["config.json", "rows.jsonl"])
def test_a_pipe_is_no_part_of_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=r"config\.json"):
        build_report(tmp_path)


# Folders of models ----------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> dict[str, str]:
    """A tiny model in one shard, by an index; returns the index's map."""
    save_tiny_model(folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    found = dict.fromkeys(tensors, "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": found}))
    return found


OUTSIDE = ("../a.safetensors", "/etc/passwd", "../../etc/passwd", "sub/a.safetensors", "..", ".", "", "a.bin", "a\\b.safetensors", "C:a.safetensors", 3, None)


@pytest.mark.parametrize("name", OUTSIDE)
def test_weights_are_read_from_the_folder_alone(tmp_path: Path, name: Any) -> None:
    """Whatever lies there: the file is not even looked for."""
    found = sharded(tmp_path / "model")
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    found[next(iter(found))] = name
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": found}))
    with pytest.raises(ConfigError, match="weight_map"):
        fingerprint_of_folder(tmp_path / "model")


def test_links_out_of_the_folder_are_the_hub_s_way(tmp_path: Path) -> None:
    """Its cache holds every file once, and folders of links to them."""
    sharded(tmp_path / "model")
    want = fingerprint_of_folder(tmp_path / "model")
    (tmp_path / "blobs").mkdir()
    for file in list((tmp_path / "model").iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    assert fingerprint_of_folder(tmp_path / "model") == want


def test_a_link_to_nothing_and_a_pipe_among_the_weights(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.safetensors").symlink_to("gone")
    with pytest.raises(ConfigError, match=r"a\.safetensors is not there, or no file"):
        fingerprint_of_folder(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"a\.safetensors is not there, or no file"):
        fingerprint_of_folder(tmp_path)


ABSURD: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 10**12},
    {"num_hidden_layers": 1e300},
    {"num_hidden_layers": 9_000},
    {"num_hidden_layers": "x"},
    {"num_labels": 10**10},
    {"num_attention_heads": 0},
    {"hidden_size": -3},
    {"hidden_size": 10**30},
    {"model_type": "mine"},
    {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
    {"rope_scaling": 3},
)


@pytest.mark.parametrize("change", ABSURD)
def test_absurd_configurations(tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, **change}))
    monkeypatch.setattr("spectralquant.model_folder.MAX_PARAMETERS", 1000)
    with pytest.raises(ConfigError, match=f"{tmp_path} can't be read; expected a model as save_pretrained writes it"):
        fingerprint_of_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 5000, '{"model_type": "llama", "a": ' + "1" * 5000 + "}", "\x00"])
def test_configurations_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="can't be read"):
        fingerprint_of_folder(tmp_path)


# Folders that are closed ----------------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be entered, for root too."""
    folder, stat = tmp_path / "closed", os.stat
    profile().save(folder / "spectralquant" / "calibration.safetensors")

    def refuse(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if not isinstance(path, int) and os.fspath(path).startswith(os.fspath(folder)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    return folder


def test_a_calibration_in_a_closed_folder(closed: Path) -> None:
    with pytest.raises(ProfileError, match=r"can't be reached \(Permission denied\); let this user read it"):
        load_profile(closed / "spectralquant" / "calibration")


def test_a_closed_folder_beside_a_model(closed: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_in(closed, {}) is None
    assert "Permission denied" in caplog.text


def test_a_model_in_a_closed_folder(closed: Path) -> None:
    with pytest.raises(ConfigError, match="Permission denied"):
        fingerprint_of_folder(closed)


def test_a_calibration_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = profile().save(tmp_path / "p")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ProfileError, match=r"p\.safetensors is not a readable calibration file .*Permission denied"):
        load_profile(path)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").mkdir()
    with pytest.raises(OSError, match=r"p\.safetensors"):
        profile().save(tmp_path / "p")
    with pytest.raises(OSError, match=r"page\.html"):
        (tmp_path / "page.html").mkdir()
        write_text(tmp_path / "page.html", "x")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.safetensors", "page.html"]


# Full disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 256 KB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_calibration_on_a_full_disk(small_disk: Path) -> None:
    """The old file is intact, and nothing is left of the new one."""
    path = profile().save(small_disk / "p")
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"can't be written .*free some space, or write elsewhere"):
        synthetic.profile(dim=128).save(path)
    assert path.read_bytes() == before and [file.name for file in small_disk.iterdir()] == [path.name]
    load_profile(path)


def test_a_text_on_a_full_disk(small_disk: Path) -> None:
    write_text(small_disk / "page.html", "old")
    with pytest.raises(OSError, match=r"page\.html") as raised:
        write_text(small_disk / "page.html", "x" * (1 << 20))
    assert raised.value.filename == str(small_disk / "page.html")
    assert (small_disk / "page.html").read_text() == "old" and len(list(small_disk.iterdir())) == 1


def test_the_command_line_says_that_the_disk_is_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("spectralquant.evaluation.page.page.write_page", fail)
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "spectralquant: No space left on device\n"
