"""A vLLM server of one's own on the loopback interface, for tests."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_SECONDS, STOP_SECONDS = 300, 60
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class Server:
    """What `vllm serve` runs, in a session of processes of its own; `vllm-cpu` lacks the metadata that the command itself looks up.

    Args:
        model: A folder.
        log: File for what it says.
        arguments: More of `vllm serve`.
        packed: Options of spectralquant; None: vLLM as it is.
        environment: More variables.
    """

    def __init__(
        self, model: str | Path, log: Path, *arguments: str, packed: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        chosen = ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"spectralquant": dict(packed)})] if packed is not None else []
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--enforce-eager",
        ]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--served-model-name", "model", *chosen, *arguments], stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, **SETTINGS, **(environment or {})},
            )  # fmt: skip

    def __enter__(self) -> "Server":
        self.wait()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with what it said where it ends before."""
        for _ in range(START_SECONDS):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.said[-20_000:]}")
            if self.is_healthy():
                return
            time.sleep(1)
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self.said[-20_000:]}")

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def ended(self, seconds: float) -> int | None:
        """The exit status, waited for so long."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int:
        """As an operator does; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        status = self.ended(STOP_SECONDS)
        for _ in range(STOP_SECONDS):
            if not self.processes():
                break
            time.sleep(1)
        return status if status is not None else -1

    def kill(self) -> None:
        """All of its processes."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def processes(self, name: str = "") -> list[int]:
        """Of those it started and itself, the ones called like that ("Worker")."""
        table = subprocess.run(["ps", "-eo", "pid=,pgid=,sid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 3) for line in table.splitlines()]
        return [int(pid) for pid, _, sid, arguments in rows if int(sid) == self.process.pid and name in arguments]

    def metric(self, name: str) -> float:
        """The sum of a counter of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{re.escape(name)}(\{{|\s)", line))

    @property
    def capacity(self) -> int:
        """Tokens of the cache, as vLLM says."""
        found = re.search(r"KV cache size: ([\d,]+) tokens", self.said)
        if found is None:
            raise RuntimeError(f"the server says nothing of its cache:\n{self.said[-5_000:]}")
        return int(found[1].replace(",", ""))
