"""Personal data as keyed hashes."""

import base64
import hashlib
import hmac

import pytest

from services.reservation.settings import Settings
from services.reservation.subjects import Identity, Kind, Lately, Subjects, identities, network, parse_keys
from shared.settings import load

OLD, NEW = bytes(range(16)), bytes(range(16, 48))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("203.0.113.77", "203.0.113.0/24"),
        ("203.0.113.0/24", "203.0.113.0/24"),
        ("::ffff:203.0.113.77", "203.0.113.0/24"),
        ("2001:db8:aaaa:bbbb::1", "2001:db8:aaaa::/48"),
        ("2001:0DB8:AAAA:0000:0000:0000:0000:0001", "2001:db8:aaaa::/48"),
        ("2001:db8:aaaa::/48", "2001:db8:aaaa::/48"),
    ],
)
def test_an_address_is_taken_for_its_network(address: str, expected: str) -> None:
    """The first 24 bits of IPv4, 48 of IPv6, however it is written."""
    assert network(address) == expected


@pytest.mark.parametrize("text", ["", "1.2.3", "1.2.3.04", "fe80::1%eth0", "203.0.113.0/25", "::1/24", "x" * 46])
def test_what_is_no_address_has_no_network(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=r"."):
        network(text)


def test_a_hash_is_an_hmac_of_kind_and_value() -> None:
    """One value is another subject as a device, and under another key."""
    subjects = Subjects({"k2": NEW, "k1": OLD})
    expected = hmac.new(NEW, b"CUSTOMER\0ann", hashlib.sha256).hexdigest()[:32]
    assert subjects.of("ann", "", "", "") == {Kind.CUSTOMER: f"customer:k2:{expected}"}
    named = subjects.named("", "ann", "")[Kind.DEVICE]
    assert named.identity == Identity(Kind.DEVICE, "ann")
    assert [one.rpartition(":")[0] for one in named.hashes] == ["device:k2", "device:k1"]
    assert len({expected, *(one.rpartition(":")[2] for one in named.hashes)}) == 3
    assert not identities("", "", "")


def test_a_reservation_keeps_its_hashes_while_their_key_is_there() -> None:
    """After a rotation the old key's hashes are still made for what was made under it, until it is gone."""
    before = Subjects({"k1": OLD}).of("ann", "tab", "203.0.113.77", "k1")
    assert Subjects({"k2": NEW, "k1": OLD}).of("ann", "tab", "203.0.113.77", "k1") == before
    after = Subjects({"k2": NEW}).of("ann", "tab", "203.0.113.77", "k1")
    assert [one.split(":")[1] for one in after.values()] == ["k2"] * 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "key 1 must be ID=BASE64"),
        ("k1", "key 1 must be ID=BASE64"),
        ("K1=AAAA", "key 1 must be ID=BASE64"),
        ("k1=secret!", "key 1 is not base64"),
        ("k1=c2VjcmV0", "at least 16 bytes"),
        (f"k1={base64.b64encode(OLD).decode()},k1={base64.b64encode(NEW).decode()}", "key 2 has the id of another"),
    ],
)
def test_bad_keys_end_the_process_without_showing_them(text: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the variable and the key's number, and nothing of the key."""
    for name in ("DATABASE_DSN", "INVENTORY_TARGET"):
        monkeypatch.setenv(f"HOLDFAST_{name}", "postgresql://x")
    monkeypatch.setenv("HOLDFAST_SUBJECT_KEYS", text)
    with pytest.raises(SystemExit) as ended:
        load(Settings)
    line = str(ended.value)
    assert line.startswith("bad settings: HOLDFAST_SUBJECT_KEYS: ")
    assert why in line
    assert "\n" not in line
    assert not any(part.partition("=")[2] in line for part in text.split(",") if "=" in part)


def test_keys_are_read_in_order() -> None:
    """The first one makes hashes."""
    text = f"k2={base64.b64encode(NEW).decode()}, k1={base64.b64encode(OLD).decode()}"
    assert parse_keys(text) == {"k2": NEW, "k1": OLD}
    assert Subjects(parse_keys(text)).key_id == "k2"


def test_lately_forgets_the_oldest() -> None:
    """Bounded, whatever comes."""
    lately = Lately(2)
    lately.add(["a", "b", "c"])
    assert [name in lately for name in "abc"] == [False, True, True]
