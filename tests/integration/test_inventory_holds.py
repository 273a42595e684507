"""Holds on the real database: what is held, what is refused, and that no race changes either."""

import asyncio
import dataclasses
import random
import time
from collections.abc import Iterable

import asyncpg
import pytest

from services.inventory import commands as commands_module
from services.inventory import store
from services.inventory.commands import Commands
from services.inventory.domain import Adjustment, Change, Changed, HoldRow, Kind, Mode, Placed
from shared.database import Connection, Database
from shared.refusal import Refusal
from tests.integration.goods import assert_sound, change, hold, put, stock


def held(answer: Placed | Refusal) -> bool:
    assert isinstance(answer, Placed), answer
    return bool(answer.allocations)


async def test_the_last_units_are_held_once(commands: Commands, inventory_db: Database) -> None:
    """200 concurrent holds for the last 50 units: exactly 50 are held."""
    await put(commands, "A", 50)
    answers = await asyncio.gather(*(commands.place([hold(f"h{n}", ("A", "MAIN", 1))]) for n in range(200)))
    assert sum(held(answer) for (answer,) in answers) == 50
    assert await stock(inventory_db, "A") == (50, 50)
    await assert_sound(inventory_db)


async def test_reversed_baskets_do_not_deadlock(commands: Commands, inventory_db: Database) -> None:
    """Baskets that name the same SKUs in opposite orders, at once, are all held."""
    for sku in ("A", "B", "C", "D"):
        await put(commands, sku, 1000)
    skus = ["A", "B", "C", "D"]
    answers = await asyncio.gather(
        *(
            commands.place([hold(f"h{n}", *((sku, "MAIN", 1) for sku in (skus if n % 2 else skus[::-1])))])
            for n in range(100)
        )
    )
    assert all(held(answer) for (answer,) in answers)
    await assert_sound(inventory_db)


async def test_a_sku_named_twice_is_summed(commands: Commands, inventory_db: Database) -> None:
    """Two lines of 3 do not fit into 5."""
    await put(commands, "A", 5)
    (answer,) = await commands.place([hold("h", ("A", "MAIN", 3), ("A", "MAIN", 3))])
    assert not held(answer)
    assert isinstance(answer, Placed)
    assert [(line.requested, line.available) for line in answer.short_lines] == [(6, 5)]
    assert await stock(inventory_db, "A") == (5, 0)


async def test_a_batch_is_decided_in_order_of_arrival(commands: Commands, inventory_db: Database) -> None:
    """Who comes first is served first; a later, smaller one takes what is left."""
    await put(commands, "A", 10)
    answers = await commands.place(
        [hold("1", ("A", "MAIN", 6)), hold("2", ("A", "MAIN", 6)), hold("3", ("A", "MAIN", 4))]
    )
    assert [held(answer) for answer in answers] == [True, False, True]
    await assert_sound(inventory_db)


async def test_modes_take_what_they_may(commands: Commands, inventory_db: Database) -> None:
    """BEST_EFFORT takes what there is, MINIMUM refuses below its minimum, ALL refuses anything less."""
    await put(commands, "A", 5)
    best, least, everything = await commands.place(
        [
            hold("best", ("A", "MAIN", 3), mode=Mode.BEST_EFFORT),
            hold("least", ("A", "MAIN", 4), mode=Mode.MINIMUM, minimum=3),
            hold("all", ("A", "MAIN", 3)),
        ]
    )
    assert [held(answer) for answer in (best, least, everything)] == [True, False, False]
    (rest,) = await commands.place([hold("rest", ("A", "MAIN", 9), mode=Mode.BEST_EFFORT)])
    assert isinstance(rest, Placed)
    assert [part.quantity for part in rest.allocations] == [2]
    assert await stock(inventory_db, "A") == (5, 5)


async def test_an_open_line_is_met_by_priority(commands: Commands, inventory_db: Database) -> None:
    """One source that suffices is taken before several; then they are taken in order of priority."""
    await put(commands, "A", 3, "NEAR", priority=1)
    await put(commands, "A", 8, "FAR", priority=2)
    (one,) = await commands.place([hold("1", ("A", "", 4))])
    assert isinstance(one, Placed)
    assert [(part.location, part.quantity) for part in one.allocations] == [("FAR", 4)]
    (both,) = await commands.place([hold("2", ("A", "", 6))])
    assert isinstance(both, Placed)
    assert [(part.location, part.quantity) for part in both.allocations] == [("FAR", 3), ("NEAR", 3)]
    await assert_sound(inventory_db)


async def test_a_hold_repeated_anywhere_is_one_hold(commands: Commands, inventory_db: Database) -> None:
    """The same hold 20 times at once, sources open, is placed once, and all hear the same."""
    await put(commands, "A", 30, "X", priority=1)
    await put(commands, "A", 30, "Y", priority=2)
    answers = await asyncio.gather(*(commands.place([hold("same", ("A", "", 5))]) for _ in range(20)))
    allocations = {answer.allocations for (answer,) in answers if isinstance(answer, Placed)}
    assert len(allocations) == 1
    assert sum(not answer.replayed for (answer,) in answers if isinstance(answer, Placed)) == 1
    assert (await stock(inventory_db, "A", "X"))[1] + (await stock(inventory_db, "A", "Y"))[1] == 5
    await assert_sound(inventory_db)


async def test_a_refusal_stays_a_refusal(commands: Commands, inventory_db: Database) -> None:
    """A refused hold that is repeated after a restock is still refused, with the lines as they were."""
    await put(commands, "A", 1)
    (first,) = await commands.place([hold("h", ("A", "MAIN", 2))])
    await put(commands, "A", 10)
    (again,) = await commands.place([hold("h", ("A", "MAIN", 2))])
    assert isinstance(first, Placed)
    assert isinstance(again, Placed)
    assert again.replayed
    assert not again.allocations
    assert again.short_lines == first.short_lines
    await assert_sound(inventory_db)


async def test_who_is_refused_does_not_hold_up_the_others(commands: Commands, inventory_db: Database) -> None:
    """Of a batch those are held for which there is enough, before and after it is known what is sold out."""
    for sku, units in (("A", 2), ("B", 100), ("C", 1)):
        await put(commands, sku, units)
    await commands.place([hold("all-of-C", ("C", "MAIN", 1), ttl_seconds=60)])
    for number in range(3):
        batch = [
            hold(f"{number}-too-many", ("A", "MAIN", 3), ("B", "MAIN", 1)),
            hold(f"{number}-held", ("B", "MAIN", 2)),
            hold(f"{number}-sold-out", ("C", "", 1)),
        ]
        answers = await commands.place(batch)
        assert [held(answer) for answer in answers] == [False, True, False]
        (a,), (c,) = (answer.short_lines for answer in answers[::2] if isinstance(answer, Placed))
        assert (a.sku, a.requested, a.available, a.next_expiry) == ("A", 3, 2, None)
        assert (c.sku, c.requested, c.available) == ("C", 1, 0)
        assert c.next_expiry is not None
        assert await commands.place(batch) == [dataclasses.replace(answer, replayed=True) for answer in answers]  # type: ignore[type-var]
    await put(commands, "C", 1)
    (answer,) = await commands.place([hold("restocked", ("C", "", 1))])
    assert held(answer)
    assert await stock(inventory_db, "B") == (100, 6)
    await assert_sound(inventory_db)


async def test_one_id_with_other_content_is_named(commands: Commands) -> None:
    """REQUEST_ID_REUSED, in one batch and in another."""
    await put(commands, "A", 10)
    _, twice = await commands.place([hold("h", ("A", "MAIN", 1)), hold("h", ("A", "MAIN", 2))])
    (later,) = await commands.place([hold("h", ("A", "MAIN", 3))])
    assert isinstance(twice, Refusal)
    assert isinstance(later, Refusal)
    assert twice.reason == later.reason == "REQUEST_ID_REUSED"


async def test_what_a_cluster_says_of_a_known_hold_is_no_outage(
    commands: Commands, inventory_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no code for it but that of an internal error: the exact way finds the hold, or places what is new."""
    await put(commands, "A", 5)
    (first,) = await commands.place([hold("h", ("A", "MAIN", 2))])
    assert isinstance(first, Placed)

    async def copied(*_: object) -> None:
        raise asyncpg.InternalServerError

    monkeypatch.setattr(store, "place", copied)
    again, fresh = await commands.place([hold("h", ("A", "MAIN", 2)), hold("fresh", ("A", "MAIN", 3))])
    assert again == dataclasses.replace(first, replayed=True)
    assert held(fresh)
    assert await stock(inventory_db, "A") == (5, 5)


async def test_one_id_names_what_is_unknown_and_what_is_not(commands: Commands) -> None:
    """Of two callers with one id only the one that names an unknown SKU is told so, whoever comes first."""
    await put(commands, "A", 10)
    fine, wrong = hold("h", ("A", "MAIN", 1)), hold("h", ("NOPE", "MAIN", 1))
    refused, placed = await commands.place([wrong, fine])
    again, other = await commands.place([fine, wrong])
    assert isinstance(refused, Refusal)
    assert refused.reason == "SKU_NOT_FOUND"
    assert held(placed)
    assert held(again)
    assert isinstance(other, Refusal)


async def test_a_refusal_says_when_a_hold_of_its_own_batch_expires(commands: Commands) -> None:
    """The one that took the last units just before."""
    await put(commands, "A", 1)
    first, second = await commands.place([hold("h1", ("A", "MAIN", 1)), hold("h2", ("A", "MAIN", 1))])
    assert isinstance(first, Placed)
    assert isinstance(second, Placed)
    assert [line.next_expiry for line in second.short_lines] == [first.expires_at]


async def test_a_hold_of_very_many_skus_is_placed_extended_and_sold(commands: Commands, inventory_db: Database) -> None:
    """In a small part of the time after which PostgreSQL takes the locks of a silent transaction away."""
    skus = [f"S{n:04}" for n in range(2_000)]
    await put(commands, "A", 1)
    async with inventory_db.connection() as connection:
        await connection.execute(
            "INSERT INTO sku (sku, name, category, unit, currency_code, price_micros)"
            " SELECT sku, sku, '', 'piece', '', 0 FROM unnest($1::text[]) AS sku",
            skus,
        )
    for some in (skus[:1_000], skus[1_000:]):
        await commands.adjust([Adjustment(f"r-{sku}", sku, "MAIN", Change.RECEIVE, 3) for sku in some])
    began = time.thread_time()
    asked = hold("h", *((sku, "MAIN", 2) for sku in skus))
    (placed,) = await commands.place([dataclasses.replace(asked, fingerprint=b"digest")])
    assert held(placed)
    for kind, lines in (
        (Kind.HOLD, [(sku, "", 0) for sku in skus]),
        (Kind.COMMIT, [(sku, "", 1) for sku in skus]),
        (Kind.RELEASE, [(sku, "MAIN", 1) for sku in skus]),
    ):
        wanted = change("h", kind, *lines, ttl_seconds=3_600)
        (changed,) = await commands.change([dataclasses.replace(wanted, fingerprint=b"digest")])
        assert isinstance(changed, Changed)
    assert time.thread_time() - began < 2.5
    assert await stock(inventory_db, skus[-1]) == (2, 0)
    await assert_sound(inventory_db)


async def test_much_that_has_expired_is_given_back_bit_by_bit(
    commands: Commands, inventory_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time here, and then who asked gets it all."""
    monkeypatch.setattr(commands_module, "RECLAIM_HOLDS_MAX", 2)
    await put(commands, "A", 5)
    await commands.place([hold(f"old{n}", ("A", "MAIN", 1), ttl_seconds=0.001) for n in range(5)])
    async with inventory_db.connection() as connection:
        await connection.fetch("SELECT pg_sleep(0.01)")
    (answer,) = await commands.place([hold("new", ("A", "MAIN", 5))])
    assert held(answer)
    assert await stock(inventory_db, "A") == (5, 5)
    await assert_sound(inventory_db)


async def test_a_key_that_drifts_keeps_no_other_from_being_swept(commands: Commands, inventory_db: Database) -> None:
    """Its own holds wait until it is repaired."""
    for sku in ("A", "B"):
        await put(commands, sku, 5)
        await commands.place([hold(f"of-{sku}", (sku, "MAIN", 2), ttl_seconds=0.001)])
    async with inventory_db.connection() as connection:
        await connection.fetch("SELECT pg_sleep(0.01)")
        await connection.execute("UPDATE stock SET held = 1 WHERE sku = 'A'")
    assert await commands.sweep() == 1
    assert await stock(inventory_db, "A") == (5, 1)
    assert await stock(inventory_db, "B") == (5, 0)


async def test_a_refusal_reclaims_what_has_expired(commands: Commands, inventory_db: Database) -> None:
    """Expired units can be sold at once; the expiry is a movement of its own."""
    await put(commands, "A", 5)
    await commands.place([hold("old", ("A", "MAIN", 5), ttl_seconds=0.001)])
    async with inventory_db.connection() as connection:
        await connection.fetch("SELECT pg_sleep(0.01)")
    (answer,) = await commands.place([hold("new", ("A", "MAIN", 5))])
    assert held(answer)
    async with inventory_db.connection() as connection:
        kinds = [row["kind"] for row in await connection.fetch("SELECT kind FROM movement ORDER BY version")]
    assert kinds == ["RECEIVE", "HOLD", "EXPIRE", "HOLD"]
    await assert_sound(inventory_db)


@pytest.mark.parametrize("kind", [Kind.COMMIT, Kind.RELEASE, Kind.HOLD])
async def test_nothing_changes_a_hold_whose_time_has_come(
    commands: Commands, inventory_db: Database, kind: Kind
) -> None:
    """Not yet swept, and over all the same: neither sold, nor given back, nor held longer."""
    await put(commands, "A", 5)
    await commands.place([hold("old", ("A", "MAIN", 5), ttl_seconds=0.001)])
    async with inventory_db.connection() as connection:
        await connection.fetch("SELECT pg_sleep(0.01)")
    (answer,) = await commands.change([change("old", kind, ("A", "MAIN", 0), ttl_seconds=60)])
    assert isinstance(answer, Refusal)
    assert answer.reason == "HOLD_EXPIRED"
    assert await stock(inventory_db, "A") == (5, 5)
    await assert_sound(inventory_db)


async def test_commit_expire_and_release_at_once_have_one_outcome(commands: Commands, inventory_db: Database) -> None:
    """Of a commit, a release and the sweeper at the instant of expiry, exactly one gets each hold, whole."""
    for sku in ("A", "B"):
        await put(commands, sku, 100)
    lines = (("A", "", 0), ("B", "", 0))
    for n in range(40):
        await commands.place([hold(f"h{n}", ("A", "MAIN", 1), ("B", "MAIN", 2), ttl_seconds=0.02)])
        committed, released, _ = await asyncio.gather(
            commands.change([change(f"h{n}", Kind.COMMIT, *lines)]),
            commands.change([change(f"h{n}", Kind.RELEASE, *lines)]),
            commands.sweep(),
        )
        assert [isinstance(answer, Changed) for (answer,) in (committed, released)].count(True) <= 1
    async with inventory_db.connection() as connection:
        await connection.fetch("SELECT pg_sleep(0.03)")
        await commands.sweep()
        rows = await connection.fetch(
            "SELECT hold_id, array_agg(committed::float / quantity) AS parts,"
            " sum(held) AS held FROM hold GROUP BY hold_id"
        )
    assert len(rows) == 40
    assert all(row["held"] == 0 and len(set(row["parts"])) == 1 for row in rows)
    await assert_sound(inventory_db)


async def test_changes_are_partial_repeated_and_bounded(commands: Commands, inventory_db: Database) -> None:
    """Parts are committed and released; a repeat changes nothing; more than is left is refused."""
    await put(commands, "A", 10)
    await commands.place([hold("h", ("A", "MAIN", 8))])
    part = change("h", Kind.COMMIT, ("A", "", 3), request_id="c1")
    (first,) = await commands.change([part])
    again, twice = await commands.change([part, part])
    (too_much,) = await commands.change([change("h", Kind.RELEASE, ("A", "", 6))])
    (other,) = await commands.change([change("h", Kind.COMMIT, ("A", "", 1), request_id="c1")])
    (rest,) = await commands.change([change("h", Kind.RELEASE, ("A", "MAIN", 0))])
    (closed,) = await commands.change([change("h", Kind.COMMIT, ("A", "", 1))])
    assert isinstance(first, Changed)
    assert isinstance(again, Changed)
    assert isinstance(twice, Changed)
    assert again.allocations == twice.allocations == first.allocations
    assert again.replayed
    assert isinstance(too_much, Refusal)
    assert too_much.reason == "HOLD_QUANTITY_EXCEEDED"
    assert isinstance(other, Refusal)
    assert other.reason == "REQUEST_ID_REUSED"
    assert isinstance(rest, Changed)
    assert [part.quantity for part in rest.allocations] == [5]
    assert isinstance(closed, Refusal)
    assert closed.reason == "HOLD_CLOSED"
    assert await stock(inventory_db, "A") == (7, 0)
    await assert_sound(inventory_db)


async def test_a_change_that_would_take_nothing_is_refused(commands: Commands, inventory_db: Database) -> None:
    """Of a place that is sold already or never had any; what is held elsewhere stays. The exact way says the same."""
    for location in ("X", "Y"):
        await put(commands, "A", 5, location)
    await commands.place([hold("h", ("A", "X", 2), ("A", "Y", 3)), hold("other", ("A", "X", 1))])
    (sold,) = await commands.change([change("h", Kind.COMMIT, ("A", "X", 0), request_id="c")])
    assert isinstance(sold, Changed)
    longer = change("other", Kind.HOLD, ("A", "", 0), ttl_seconds=3_600)
    for batch in ([], [longer]):  # at once, and exactly
        for lines, reason in (
            ([("A", "X", 0)], "HOLD_CLOSED"),
            ([("A", "Z", 0)], "HOLD_NOT_FOUND"),
            ([("A", "Z", 0), ("A", "Y", 1)], "HOLD_NOT_FOUND"),
            ([("A", "X", 1)], "HOLD_QUANTITY_EXCEEDED"),
        ):
            (*_, answer) = await commands.change([*batch, change("h", Kind.COMMIT, *lines)])
            assert isinstance(answer, Refusal)
            assert answer.reason == reason
    (again,) = await commands.change([change("h", Kind.COMMIT, ("A", "X", 0), request_id="c")])
    assert isinstance(again, Changed)
    assert again.replayed
    (rest,) = await commands.change([change("h", Kind.COMMIT, ("A", "X", 0), ("A", "Y", 0))])
    assert isinstance(rest, Changed)
    assert [(part.location, part.quantity) for part in rest.allocations] == [("Y", 3)]
    assert [await stock(inventory_db, "A", at) for at in ("X", "Y")] == [(3, 1), (2, 0)]
    await assert_sound(inventory_db)


async def test_extension_moves_the_expiry_within_its_bound(commands: Commands) -> None:
    """An extension never shortens, and a hold lives at most seven days."""
    await put(commands, "A", 10)
    (placed,) = await commands.place([hold("h", ("A", "MAIN", 1), ttl_seconds=100)])
    assert isinstance(placed, Placed)
    (longer,) = await commands.change([change("h", Kind.HOLD, ("A", "", 0), ttl_seconds=500)])
    (shorter,) = await commands.change([change("h", Kind.HOLD, ("A", "", 0), ttl_seconds=1)])
    (beyond,) = await commands.change([change("h", Kind.HOLD, ("A", "", 0), ttl_seconds=8 * 86400)])
    assert isinstance(longer, Changed)
    assert isinstance(shorter, Changed)
    assert longer.expires_at > placed.expires_at
    assert shorter.expires_at == longer.expires_at
    assert isinstance(beyond, Refusal)
    assert beyond.reason == "HOLD_LIFE_EXCEEDED"


async def test_expiry_asked_for_tells_all_that_ever_expired(commands: Commands, inventory_db: Database) -> None:
    """Before its time it is refused; afterwards the answer is the same however often it is asked."""
    await put(commands, "A", 10)
    await commands.place([hold("h", ("A", "MAIN", 4), ttl_seconds=60)])
    ask = change("h", Kind.EXPIRE, ("A", "", 0))
    (early,) = await commands.change([ask])
    assert isinstance(early, Refusal)
    assert early.reason == "HOLD_NOT_EXPIRED"
    async with inventory_db.connection() as connection:
        await connection.execute("UPDATE hold SET expires_at = now()")
    for _ in range(2):
        (late,) = await commands.change([ask])
        assert isinstance(late, Changed)
        assert [part.quantity for part in late.allocations] == [4]
    await assert_sound(inventory_db)


async def test_an_expiry_has_no_id_to_be_reused(commands: Commands, inventory_db: Database) -> None:
    """A change of the same id is another matter, whichever way the expiry is decided."""
    await put(commands, "A", 10)
    for hold_id in ("h", "other"):
        await commands.place([hold(hold_id, ("A", "MAIN", 4))])
    await commands.change([change("h", Kind.COMMIT, ("A", "", 1), request_id="expire")])
    async with inventory_db.connection() as connection:
        await connection.execute("UPDATE hold SET expires_at = now() WHERE hold_id = 'h'")
    longer = change("other", Kind.HOLD, ("A", "", 0), ttl_seconds=3_600)
    for batch in ([longer], []):  # exactly, and at once
        (*_, late) = await commands.change([*batch, change("h", Kind.EXPIRE, ("A", "", 0), request_id="expire")])
        assert isinstance(late, Changed)
        assert [part.quantity for part in late.allocations] == [3]
    await assert_sound(inventory_db)


async def test_any_mix_of_concurrent_work_keeps_the_books(commands: Commands, inventory_db: Database) -> None:
    """Random holds, commits, releases, receipts and sweeps at once: counters, ledger and holds agree."""
    dice = random.Random(7)
    skus = [f"S{n}" for n in range(5)]
    for sku in skus:
        await put(commands, sku, 20)

    async def shopper(n: int) -> None:
        for step in range(10):
            name = f"{n}-{step}"
            chosen = dice.sample(skus, dice.randint(1, 4))
            ttl = dice.choice([0.005, 60])
            lines = [(sku, dice.choice(["MAIN", ""]), dice.randint(1, 3)) for sku in chosen]
            mode = dice.choice([Mode.ALL, Mode.BEST_EFFORT])
            await commands.place([hold(name, *lines, mode=mode, ttl_seconds=ttl)])
            kind = dice.choice([Kind.COMMIT, Kind.RELEASE])
            await commands.change([change(name, kind, *((sku, "", 0) for sku in chosen))])
            if step == 5:
                await put(commands, dice.choice(skus), 5)
            await commands.sweep()

    await asyncio.gather(*(shopper(n) for n in range(12)))
    await assert_sound(inventory_db)


async def test_one_id_at_once_on_different_keys_is_one_hold(commands: Commands, inventory_db: Database) -> None:
    """Nothing that both would lock stands between them: one is first, the other is a named error or a repeat."""
    for location in ("X", "Y"):
        await put(commands, "A", 10, location)
    for n in range(20):
        answers = await asyncio.gather(
            *(commands.place([hold(f"h{n}", ("A", location, 1))]) for location in ("X", "Y") * 2)
        )
        reasons = [answer.reason if isinstance(answer, Refusal) else "" for (answer,) in answers]
        assert sorted(reasons) == ["", "", "REQUEST_ID_REUSED", "REQUEST_ID_REUSED"]
    await assert_sound(inventory_db)


async def test_one_refusal_at_once_of_goods_never_stocked_is_one(commands: Commands, inventory_db: Database) -> None:
    """Twenty repeats at once on a key without a row to lock all hear the same refusal."""
    await put(commands, "A", 1)
    await put(commands, "B", 1, "SHOP")
    answers = await asyncio.gather(*(commands.place([hold("h", ("A", "SHOP", 1))]) for _ in range(20)))
    assert all(isinstance(answer, Placed) and not answer.allocations for (answer,) in answers)
    assert sum(not answer.replayed for (answer,) in answers if isinstance(answer, Placed)) == 1
    await assert_sound(inventory_db)


async def test_a_hold_placed_while_its_commit_is_on_its_way_is_not_known_yet(
    commands: Commands, inventory_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not there when the locks were taken is left alone."""
    await put(commands, "A", 5)
    read_holds = store.read_holds
    calls = 0

    async def late(connection: Connection, ids: Iterable[tuple[str, str]]) -> dict[str, list[HoldRow]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            return {}
        if calls == 2:
            await commands.place([hold("h", ("A", "MAIN", 2))])
            return {}
        return await read_holds(connection, ids)

    with monkeypatch.context() as patch:
        patch.setattr(store, "read_holds", late)
        (early,) = await commands.change([change("h", Kind.COMMIT, ("A", "", 0))])
    assert isinstance(early, Refusal)
    assert early.reason == "HOLD_NOT_FOUND"
    assert await stock(inventory_db, "A") == (5, 2)


async def test_a_hold_that_is_locked_in_part_is_not_known_yet(
    commands: Commands, inventory_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that appears after the locks were taken, of which they cover a part, is left alone whole."""
    await put(commands, "A", 5, "NEAR", priority=1)
    await put(commands, "A", 5, "FAR", priority=2)
    await commands.place([hold("first", ("A", "NEAR", 1))])
    read_holds = store.read_holds
    calls = 0

    async def late(connection: Connection, ids: Iterable[tuple[str, str]]) -> dict[str, list[HoldRow]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            found = await read_holds(connection, ids)
            await commands.place([hold("split", ("A", "", 7))])
            return found
        return await read_holds(connection, ids)

    longer = change("first", Kind.HOLD, ("A", "", 0), ttl_seconds=3_600)
    with monkeypatch.context() as patch:
        patch.setattr(store, "read_holds", late)
        kept, early = await commands.change([longer, change("split", Kind.COMMIT, ("A", "", 0))])
    assert isinstance(kept, Changed)
    assert isinstance(early, Refusal)
    assert await stock(inventory_db, "A", "NEAR") == (5, 5)
    assert await stock(inventory_db, "A", "FAR") == (5, 3)
    await assert_sound(inventory_db)
