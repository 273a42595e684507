"""The release after this one, for want of a real one: the same code, on a schema that changes under it."""

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from deploy.local.stack import REPOSITORY

# The tables that each service reads and writes most.
TABLES = {
    "inventory": ("stock", "hold", "hold_change", "request", "movement"),
    "reservation": ("reservation", "reservation_change", "allocation"),
    "analytics": ("stock_view", "reservation"),
}
MIGRATION = '''"""A column that nobody reads."""

from alembic import op

revision = "{number:04}"
down_revision = "{before}"


def upgrade() -> None:
    for table in {tables}:
        op.execute(f"ALTER TABLE {{table}} {change}")
'''


def after(code: Path, root: Path) -> Iterator[Path]:
    """The releases after a checkout, oldest first: this one if it is another, then copies of it that are made in `root`
    and have one more migration for each service and phase. Their tables get a column before pods change, which has
    gone again when all have.
    """
    if code != REPOSITORY:
        yield REPOSITORY
    code = REPOSITORY
    for number in count(1):
        code = _copied(code, root / f"release-{number}")
        yield code


def _copied(code: Path, release: Path) -> Path:
    for package in ("services", "shared"):
        shutil.copytree(code / package, release / package)
    (release / ".venv").symlink_to(REPOSITORY / ".venv")
    for service, tables in TABLES.items():
        for phase, change in (
            ("pre", "ADD COLUMN added_{} text NOT NULL DEFAULT ''"),
            ("post", "DROP COLUMN added_{}"),
        ):
            directory = release / "services" / service / "migrations" / phase
            number = 1 + max(int(file.name[:4]) for file in directory.glob("0*.py"))
            migration = MIGRATION.format(
                number=number, before=f"{number - 1:04}", tables=tables, change=change.format(release.name[8:])
            )
            (directory / f"{number:04}_next.py").write_text(migration)
    return release
