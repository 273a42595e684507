"""The clock that chaos sets is the one that services read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.stack import REPOSITORY
from tests.model.skewed import Clock

READ = """
import importlib, json, sys, time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
importlib.import_module(sys.argv[2] + ".__main__")
from tests.model.skewed import Clock
clock = Clock(Path(sys.argv[1]))
clock.install()
clock.set(-300)
read = {}
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in {"services", "shared"}:
        for word, value in list(vars(module).items()):
            if isinstance(value, type) and value.__name__.lower() == "datetime":
                read[f"{name}.{word}.now"] = value.now(UTC).timestamp() - time.time()
            elif isinstance(value, ModuleType) and value.__name__ == "time":
                read[f"{name}.{word}.time"] = value.time() - time.time()
                read[f"{name}.{word}.time_ns"] = value.time_ns() / 1e9 - time.time()
                read[f"{name}.{word}.monotonic"] = value.monotonic() - time.monotonic()
print(json.dumps(read))
"""


@pytest.mark.parametrize("service", ["inventory", "reservation", "analytics"])
def test_every_module_reads_the_clock_that_was_set(service: str, tmp_path: Path) -> None:
    """Whatever name they know it by; the monotonic clock goes on as it does."""
    clock = Clock(tmp_path / "clock")
    command = [sys.executable, "-c", READ, str(clock.file), f"services.{service}"]
    ran = subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE)
    read = json.loads(ran.stdout)
    assert sum(name.endswith("datetime.now") for name in read) > 3
    assert sum(name.endswith("time.time") for name in read) > 3
    for name, ahead in read.items():
        assert ahead == pytest.approx(0 if name.endswith("monotonic") else -300, abs=1), name
