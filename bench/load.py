"""One run of a load generator against some pods, and what it came to."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deploy.local.stack import REPOSITORY, StackError

GHZ = "github.com/bojand/ghz/cmd/ghz@v0.121.0"
CONFIGS = Path(__file__).with_name("ghz")
CONNECTIONS = 2
CALL_SECONDS_MAX = 20
Pids = Mapping[str, Sequence[int]]
Processes = list[subprocess.Popen[bytes]]


@dataclass(slots=True)
class Run:
    """Calls that were answered well, those that were not, their latencies (ms), and CPU (us a call) by side."""

    calls: int = 0
    rate: float = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)
    items: int = 1

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    def percentile(self, share: int) -> float:
        ordered = sorted(self.latencies) or [0.0]
        return ordered[min(len(ordered) * share // 100, len(ordered) - 1)]

    def figures(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "rate": round(self.rate, 1),
            "errors": dict(self.errors),
            "items_a_call": self.items,
            **{f"p{share}_ms": round(self.percentile(share), 2) for share in (50, 95, 99)},
            "cpu_us_a_call": {side: round(cost, 1) for side, cost in self.cpu.items()},
        }


def ghz_binary(root: Path) -> Path:
    """Ghz out of its Go module, built once into `root`."""
    binary = root / "bin" / "ghz"
    if not binary.exists():
        go = shutil.which("go")
        if go is None:
            raise StackError("go is missing (it builds ghz, the load generator): install Go 1.22 or newer")
        done = subprocess.run(
            [go, "install", GHZ],
            env=os.environ | {"GOBIN": str(binary.parent)},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise StackError(f"go install {GHZ} failed: {done.stderr.strip()[-500:]}")
    return binary


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of processes and all their descendants so far, those that have ended by now included."""
    seconds = 0.0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
        for member in family:
            try:
                times = member.cpu_times()
            except psutil.Error:
                continue
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def ghz(
    binary: Path,
    config: str,
    pods: Sequence[str],
    *,
    seconds: float,
    callers: int = 64,
    rate: float = 0,
    deadline_seconds: float = CALL_SECONDS_MAX,
    data: Path | None = None,
    tls_directory: str = "",
) -> Processes:
    """Start ghz against each pod, callers or calls a second shared among them; with `rate` it is an open loop."""
    share = max(callers // len(pods), 1)
    processes = []
    for pod in pods:
        arguments: list[str] = [
            str(binary), "--config", str(CONFIGS / f"{config}.json"), "-O", "json", "-z", f"{seconds}s",
            "--duration-stop", "wait", "-c", str(share), "--connections", str(min(CONNECTIONS, share)),
            "-t", f"{deadline_seconds}s",
        ]  # fmt: skip
        if rate:
            arguments += ["--rps", str(max(round(rate / len(pods)), 1)), "--async"]
        if tls_directory:
            files = {"--cacert": "ca.crt", "--cert": "tls.crt", "--key": "tls.key"}
            arguments.append("--no-insecure")
            arguments += [part for flag, name in files.items() for part in (flag, f"{tls_directory}/{name}")]
        if data:
            arguments += ["-D", str(data)]
        processes.append(subprocess.Popen([*arguments, pod], stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def python(mode: str, pods: Sequence[str], *, seconds: float, skus: int) -> Processes:
    """Start `bench.generator` against each pod."""
    command = [sys.executable, "-m", "bench.generator", mode, "--seconds", str(seconds), "--skus", str(skus)]
    return [
        subprocess.Popen([*command, pod], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for pod in pods
    ]


def measure(start: Callable[[], Processes], pids: Pids) -> Run:
    """Run generators to their end and add up what they saw, with the CPU that each side took meanwhile."""
    before = {side: cpu_seconds(group) for side, group in pids.items()}
    ended = _ended_children_seconds()
    processes = start()
    outputs = [process.communicate() for process in processes]
    spent = _ended_children_seconds() - ended
    after = {side: cpu_seconds(group) for side, group in pids.items()}
    run = Run()
    for process, (out, complaint) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise StackError(f"the load generator failed: {complaint.decode()[-500:]}")
        seen = json.loads(out)
        good = [one for one in seen["details"] if one["status"] == "OK"]
        bad = [one["status"] for one in seen["details"] if one["status"] != "OK"]
        run.errors.update(bad)
        run.latencies += [one["latency"] / 1e6 for one in good]
        run.calls += len(good)
        run.rate += len(good) / (seen["total"] / 1e9)
        run.items = seen.get("items", 1)
    calls = max(run.calls + run.failed, 1)
    run.cpu = {side: (after[side] - before[side]) / calls * 1e6 for side in pids}
    run.cpu["generator"] = spent / calls * 1e6
    return run


def _ended_children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
