"""The first program of the README does what the README says."""

import re
import subprocess
import sys
from pathlib import Path

from deploy.local.supervisor import Supervisor

ROOT = Path(__file__).parents[2]
PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)
PROMISE = re.compile(r"It prints `(.*?)`")


def test_the_first_program_runs_twice(pods: Supervisor, tmp_path: Path) -> None:
    """On whatever is up, and the second time nothing is done twice."""
    readme = (ROOT / "README.md").read_text()
    (program,), (promise,) = PROGRAM.findall(readme), PROMISE.findall(readme)
    (tmp_path / ".local").symlink_to(pods.endpoints_file.parent)
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False, capture_output=True, text=True)
        assert (ran.stdout.strip(), ran.returncode) == (promise, 0), ran.stderr
