"""Lists of the desk, a page at a time."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared import pages
from shared.database import Connection, Record


class Listing(NamedTuple):
    """Rows of a table by its id, or by a time and its id with the latest first."""

    source: str
    id: str
    time: str = ""

    async def page(
        self, connection: Connection, asked: Any, conditions: Mapping[str, object]
    ) -> tuple[list[Record], str]:
        """The rows of a page, for which each of the conditions on its parameter is true, and the next page's token."""
        limit, bound = pages.size(asked.page_size), [self.source, *conditions.items()]
        after = pages.decode(asked.page_token, bound, 2 if self.time else 1)
        where = [condition.replace("?", f"${n}") for n, condition in enumerate(conditions, 1)] or ["true"]
        parameters = list(conditions.values())
        order = self.id
        if self.time:
            order = f"{self.time} DESC, {self.id} DESC"
        if after and self.time:
            where.append(f"({self.time}, {self.id}) < (${len(parameters) + 1}, ${len(parameters) + 2})")
            parameters += [pages.instant(after[0]), after[1]]
        elif after:
            where.append(f"{self.id} > ${len(parameters) + 1}")
            parameters += after
        query = f"SELECT * FROM {self.source} WHERE {' AND '.join(where)} ORDER BY {order} LIMIT {limit + 1}"  # noqa: S608 - of constants
        rows = list(await connection.fetch(query, *parameters))
        if len(rows) <= limit:
            return rows, ""
        last = rows[limit - 1]
        position = [last[self.time].isoformat(), last[self.id]] if self.time else [last[self.id]]
        return rows[:limit], pages.encode(position, bound)
