"""Alerts open once and with what caused them, close, and survive whoever judges them a second time."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import TopicPartition
from holdfast.inventory.v1 import events_pb2 as inventory_events
from holdfast.inventory.v1 import inventory_pb2 as ip

from services.analytics import alerts, codec, delivery, desk, notification_workers, store
from services.analytics.alerting import Kind, Rule, Severity
from services.analytics.alerts import Crossings
from services.analytics.projection import Projection
from shared.consumer import Batch, Elsewhere
from shared.database import Connection, Database
from shared.wire import timestamp
from tests.integration.test_projection import bury, message

W = Severity.WARNING
OUT = Rule("out", Kind.STOCK_OUT, Severity.CRITICAL, 1, 1)
LOW = Rule("low", Kind.AVAILABLE_BELOW, W, 10, 20)
BACK = Rule("back", Kind.BACK_IN_STOCK, Severity.INFO)
PLACE = TopicPartition(codec.MOVEMENTS_TOPIC, 0)


class Shelf:
    """Feeds a projection with movements that set what is on hand."""

    def __init__(self, database: Database, crossings: Crossings | None = None) -> None:
        self.projection = Projection(database, crossings)
        self._versions: dict[str, int] = {}
        self._last: Batch | None = None

    async def set(self, *changes: tuple[str, int]) -> None:
        """Set SKUs at MAIN to units, in one batch."""
        values = []
        for sku, on_hand in changes:
            self._versions[sku] = self._versions.get(sku, 0) + 1
            moved = ip.Movement(
                sku=sku, location="MAIN", version=self._versions[sku], kind=ip.MOVEMENT_KIND_COUNT, on_hand=on_hand,
                time=timestamp(datetime.now(UTC)),
            )  # fmt: skip
            values.append(inventory_events.StockMoved(movement=moved).SerializeToString())
        at = (await self.projection.positions([PLACE]))[PLACE]
        self._last = Batch(PLACE, at, [message(PLACE.topic, n, value) for n, value in enumerate(values, at)])
        await self.projection.apply(self._last, bury)

    async def again(self) -> None:
        """The last batch a second time, as after a crash of another pod."""
        assert self._last
        with pytest.raises(Elsewhere):
            await self.projection.apply(self._last, bury)


async def make(database: Database, *rules: Rule) -> None:
    for rule in rules:
        await database.run(lambda connection, rule=rule: desk.create_rule(connection, rule))  # type: ignore[misc]


async def rows(database: Database, query: str, *parameters: object) -> list[dict[str, Any]]:
    async with database.connection() as connection:
        return [dict(row) for row in await connection.fetch(query, *parameters)]


async def events(database: Database, sku: str = "A") -> list[tuple[str, str, int, float]]:
    """What is to be told of a SKU, in order: rule, transition, version, value."""
    found = await rows(
        database,
        "SELECT rule_id, transition, e.version, (content->>'value')::float8 AS value FROM desk.alert_event AS e"
        " JOIN desk.alert USING (alert_id) WHERE sku = $1 ORDER BY seq",
        sku,
    )
    return [(row["rule_id"], row["transition"], row["version"], row["value"]) for row in found]


async def is_open(database: Database, rule: str = "out") -> int:
    query = "SELECT count(*) AS n FROM desk.alert WHERE rule_id = $1 AND state = 'OPEN'"
    return int((await rows(database, query, rule))[0]["n"])


async def test_a_crossing_opens_and_the_way_back_closes(analytics_db: Database) -> None:
    """Below the level it opens, between the levels it stays, halved it is told again, at the close level it is over."""
    await make(analytics_db, LOW)
    shelf = Shelf(analytics_db, Crossings())
    for units in (100, 9, 12, 8, 15, 20, 15, 9):
        await shelf.set(("A", units))
        await shelf.again()
    assert await events(analytics_db) == [
        ("low", "OPENED", 1, 9), ("low", "CLOSED", 2, 20), ("low", "OPENED", 1, 9),
    ]  # fmt: skip
    await shelf.set(("A", 4))
    await notification_workers.sweep(analytics_db)
    await notification_workers.sweep(analytics_db)
    assert (await events(analytics_db))[3:] == [("low", "UPDATED", 2, 4)]


async def test_a_stock_out_ends_and_the_goods_are_back(analytics_db: Database) -> None:
    """The stock-out closes, and those who wait for goods are told once, in an alert that is over as it begins."""
    await make(analytics_db, OUT, BACK, Rule("far", Kind.BACK_IN_STOCK, W, location="NORTH"))
    shelf = Shelf(analytics_db, Crossings())
    for units in (5, 0, 0, 3, 2):
        await shelf.set(("A", units))
    assert await events(analytics_db) == [
        ("out", "OPENED", 1, 0), ("out", "CLOSED", 2, 3), ("back", "OPENED", 1, 3),
    ]  # fmt: skip
    assert await rows(analytics_db, "SELECT 1 FROM desk.alert WHERE state = 'OPEN'") == []


async def test_a_new_key_that_begins_low_opens(analytics_db: Database) -> None:
    """A key has no level to come from; where it starts is what counts."""
    await make(analytics_db, LOW, OUT)
    shelf = Shelf(analytics_db, Crossings())
    await shelf.set(("A", 5), ("B", 0), ("C", 50))
    assert [event[:2] for event in await events(analytics_db)] == [("low", "OPENED")]
    assert sorted(event[:2] for event in await events(analytics_db, "B")) == [("low", "OPENED"), ("out", "OPENED")]
    assert await events(analytics_db, "C") == []


async def test_the_alert_commits_with_the_stock_change(analytics_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the transaction that opened an alert fails, neither the change nor the alert has been; then both are."""
    await make(analytics_db, OUT)
    shelf = Shelf(analytics_db, Crossings())
    await shelf.set(("A", 5))
    count = store.count_lag

    async def fail(_connection: Connection, *_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(store, "count_lag", fail)
    with pytest.raises(RuntimeError):
        await shelf.set(("A", 0))
    assert await events(analytics_db) == []
    assert [row["available"] for row in await rows(analytics_db, "SELECT available FROM stock_view")] == [5]
    monkeypatch.setattr(store, "count_lag", count)
    shelf._versions["A"] -= 1
    await shelf.set(("A", 0))
    assert await events(analytics_db) == [("out", "OPENED", 1, 0)]


async def test_what_crosses_nothing_costs_nothing(analytics_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are looked at once; only a crossing asks the database."""
    await make(analytics_db, LOW)
    asked: list[object] = []
    judged = alerts.judge_keys

    async def judge_keys(connection: Connection, keys: Sequence[tuple[str, str]]) -> int:
        asked.append(keys)
        return await judged(connection, keys)

    monkeypatch.setattr(alerts, "judge_keys", judge_keys)
    shelf = Shelf(analytics_db, Crossings())
    for units in (100, 90, 30, 25, 9, 5, 4):
        await shelf.set(("A", units), ("B", 50))
    assert asked == [[("A", "MAIN")]]


async def test_without_crossings_nothing_opens(analytics_db: Database) -> None:
    """A rebuild applies every event there ever was and tells nobody; the sweep finds what is so now."""
    await make(analytics_db, OUT)
    shelf = Shelf(analytics_db)
    for units in (5, 0, 4, 0):
        await shelf.set(("A", units))
    assert await events(analytics_db) == []
    await notification_workers.sweep(analytics_db)
    assert await events(analytics_db) == [("out", "OPENED", 1, 0)]


async def test_the_sweep_finds_what_new_rules_find_page_by_page(analytics_db: Database) -> None:
    """Every key, in pages of two; a second sweep finds nothing new."""
    shelf = Shelf(analytics_db)
    await shelf.set(*((f"S{n}", n) for n in range(7)))
    await make(analytics_db, Rule("low", Kind.AVAILABLE_BELOW, W, 5, 5, sku_prefix="S"))
    assert await notification_workers.sweep(analytics_db, keys_max=2) == 5
    assert await notification_workers.sweep(analytics_db, keys_max=2) == 0
    assert await is_open(analytics_db, "low") == 5


async def test_cover_is_judged_by_the_pace_of_sales(analytics_db: Database) -> None:
    """Ten sold on the first day and five left is half a day; what does not sell is never short."""
    await make(analytics_db, Rule("cover", Kind.COVER_BELOW, W, 1, 2))
    await Shelf(analytics_db).set(("A", 5), ("B", 1))
    async with analytics_db.connection() as connection:
        await connection.execute("UPDATE stock_view SET sold_30d = 10 WHERE sku = 'A'")
    await notification_workers.sweep(analytics_db)
    assert await events(analytics_db) == [("cover", "OPENED", 1, 0.5)]
    assert await events(analytics_db, "B") == []
    async with analytics_db.connection() as connection:
        await connection.execute("UPDATE stock_view SET sold_30d = 0")
    await notification_workers.sweep(analytics_db)
    assert (await events(analytics_db))[1:] == [("cover", "CLOSED", 2, 9999)]


async def test_two_that_judge_at_once_open_once(analytics_db: Database) -> None:
    """Sweeps beside each other and beside the projection: one open alert for each rule and key, no event twice."""
    await make(analytics_db, OUT, LOW, BACK)
    shelf = Shelf(analytics_db, Crossings())
    for turn in range(6):
        units = [(f"S{n}", (n + turn) % 3) for n in range(20)]
        await asyncio.gather(
            shelf.set(*units), *(notification_workers.sweep(analytics_db, keys_max=7) for _ in range(4))
        )
    twice = "SELECT rule_id, key FROM desk.alert WHERE state = 'OPEN' GROUP BY 1, 2 HAVING count(*) > 1"
    assert await rows(analytics_db, twice) == []
    ends = await rows(
        analytics_db,
        "WITH v AS MATERIALIZED (SELECT sku, available FROM stock_view)"
        " SELECT (SELECT count(*) FROM desk.alert WHERE rule_id = 'out' AND state = 'CLOSED') AS ended,"
        " (SELECT count(*) FROM desk.alert WHERE rule_id = 'back') AS back,"
        " (SELECT count(*) FROM desk.alert AS a WHERE rule_id = 'out' AND (state = 'OPEN')"
        "    <> ((SELECT available FROM v WHERE v.sku = a.sku) = 0)"
        "    AND opened_at = (SELECT max(opened_at) FROM desk.alert AS b WHERE b.key = a.key AND rule_id = 'out'))"
        "  AS wrong",
    )
    assert ends[0]["ended"] == ends[0]["back"] > 0
    assert ends[0]["wrong"] == 0


async def test_a_deleted_rule_closes_its_alerts(analytics_db: Database) -> None:
    """They are told that it is over, and the id is not free again."""
    await make(analytics_db, OUT)
    await Shelf(analytics_db, Crossings()).set(("A", 0))
    await analytics_db.run(lambda connection: desk.delete_rule(connection, "out"))
    await notification_workers.monitor(analytics_db)
    assert [event[1] for event in await events(analytics_db)] == ["OPENED", "CLOSED"]
    async with analytics_db.connection() as connection:
        assert await alerts.insert_rule(connection, OUT) is None


async def test_drift_lag_and_dead_deliveries(analytics_db: Database) -> None:
    """Each opens above its level and closes below the other; what was never measured is no alert."""
    await analytics_db.run(alerts.insert_defaults)

    async def system() -> list[tuple[str, str]]:
        await notification_workers.monitor(analytics_db)
        found = await rows(analytics_db, "SELECT kind, key FROM desk.alert WHERE state = 'OPEN' ORDER BY kind")
        return [(row["kind"], row["key"]) for row in found]

    assert await system() == []
    async with analytics_db.connection() as connection:
        await connection.execute("UPDATE reconciled SET reconciled_at = now(), drift_units = 3")
        await connection.execute(
            "INSERT INTO consumed SELECT topic, 0, 1, now() - interval '5 minutes' FROM unnest($1::text[]) AS topic",
            [codec.MOVEMENTS_TOPIC, codec.CHANGES_TOPIC],
        )
        await connection.execute(
            "INSERT INTO desk.delivery (delivery_id, subscription_id, target_id, urgent, state, subject, body, content,"
            " attempts_max, due_at) VALUES ('d', 's', 't', false, 'DEAD', '', '', '{}', 1, now())"
        )
    assert await system() == [("DEAD_LETTERS", "deliveries"), ("DRIFT", "mart"), ("LAG", "events")]
    async with analytics_db.connection() as connection:
        await connection.execute("UPDATE reconciled SET drift_units = 0")
        await connection.execute("UPDATE consumed SET complete_until = now() - interval '20 seconds'")
        await connection.execute("DELETE FROM desk.delivery")
    assert await system() == [("LAG", "events")]
    async with analytics_db.connection() as connection:
        await connection.execute("UPDATE consumed SET complete_until = now() - interval '5 seconds'")
    assert await system() == []


async def test_a_fraud_case_opens_once_and_closes(analytics_db: Database) -> None:
    """Within the caller's transaction, with its details; a second opening and a second closing change nothing."""
    await make(analytics_db, Rule("fraud", Kind.FRAUD_CASE, W), Rule("elsewhere", Kind.FRAUD_CASE, W, location="NORTH"))
    for _ in range(2):
        await analytics_db.run(lambda c: alerts.fraud_case_opened(c, "case-1", {"sku": "A", "score": "0.9"}))
    for _ in range(2):
        await analytics_db.run(lambda c: alerts.fraud_case_closed(c, "case-1"))
    assert [event[:3] for event in await events(analytics_db)] == [("fraud", "OPENED", 1), ("fraud", "CLOSED", 2)]

    async def fail(connection: Connection) -> None:
        await alerts.fraud_case_opened(connection, "case-2", {})
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await analytics_db.run(fail)
    assert await rows(analytics_db, "SELECT 1 FROM desk.alert WHERE key = 'case-2'") == []


async def test_what_is_old_and_over_is_forgotten(analytics_db: Database) -> None:
    """Closed alerts, settled deliveries with their attempts, and requests; what is open stays."""
    await make(analytics_db, OUT)
    shelf = Shelf(analytics_db, Crossings())
    for units in (0, 5, 0):
        await shelf.set(("A", units))
    await delivery.forget(analytics_db, datetime.now(UTC))
    assert [row["state"] for row in await rows(analytics_db, "SELECT state FROM desk.alert")] == ["OPEN"]
