"""Who may call what, who is who by a token, how often, and which files and settings count."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from deploy.local.certificates import Authority
from deploy.local.supervisor import ACCESS_FILE
from services.inventory.servicer import ERRORS
from services.inventory.settings import Settings
from services.reservation.inventory import _unreachable
from shared import files, tls, tokens
from shared.access import Access, Limits, Table, calls, read
from shared.admission import CALLERS_MAX, RIGHTS_MAX, Admission, Caller
from shared.errors import DETAILS_KEY
from shared.refusal import Refusal
from shared.settings import load, loopback
from shared.tokens import InvalidTokenError, Tokens

ACCESS = str(ACCESS_FILE)
RESERVE = "holdfast.reservation.v1.ReservationService/Reserve"
PLACE = "/holdfast.inventory.v1.InventoryService/PlaceHolds"
ISSUER, AUDIENCE = "https://issuer.example", "holdfast"
SIGNERS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


class Call:
    """A call as admission sees it."""

    def __init__(self, *names: str, token: str = "", peer: str = "ipv4:10.0.0.1:4711") -> None:
        self._names = names
        self._token = token
        self._peer = peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_subject_alternative_name": [name.encode() for name in self._names]} if self._names else {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self._token}")] if self._token else []

    def peer(self) -> str:
        return self._peer


def refused(work: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        work()
    return caught.value


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_shipped_table_knows_every_call_and_gives_holds_to_reservation_alone() -> None:
    """Every call has a role; nobody else places holds; whom a hash stands for has a role of its own, out of tokens."""
    access = read(ACCESS, Limits(5, 6))
    table = access._table
    given = {name: access.of_certificate([name]) for name in table.certificates}
    assert frozenset().union(*(rights.calls for rights in given.values())) == {
        call for service in calls().values() for call in service
    }
    holds = {call for call in given["reservation"].calls if call.endswith("Holds")}
    assert len(holds) == 4
    for name, rights in given.items():
        assert name == "reservation" or not holds & rights.calls
    assert {name for name, rights in given.items() if any("Resolve" in call for call in rights.calls)} == {
        "data-protection"
    }
    assert not access.of_token("anybody", ["data-protection", "reservation"]).calls
    assert given["reservation"].limits == Limits()
    assert given["shop"].limits == Limits(5, 6)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f'[roles.shop]\ncalls = ["{RESERVE}d"]', f"roles.shop: there is no call {RESERVE}d"),
        ('[roles.shop]\ncalls = ["holdfast.Nothing/*"]', "roles.shop: there is no call holdfast.Nothing/*"),
        ('[roles.shop]\ncalls = []\n[certificates]\n"a.b" = ["shoop"]', 'certificates."a.b": there is no role shoop'),
        ('[roles.shop]\ncalls = []\n[subjects]\nx = ["shoop"]', 'subjects."x": there is no role shoop'),
        ("[roles.shop]\ncalls = []\ncalls_per_second = 5", "roles.shop.calls_per_second: Extra inputs"),
        ("[roles.shop]\ncalls = []\nin_flight_calls_max = -1", "roles.shop.in_flight_calls_max: "),
        ("nonsense", "Expected '='"),
    ],
)
def test_a_bad_table_is_refused_by_name(text: str, why: str, tmp_path: Path) -> None:
    """What is wrong, and where."""
    file = tmp_path / "access.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"(?s).") as caught:
        read(str(file), Limits())
    assert why in str(caught.value)


def table(**roles: dict[str, Any]) -> Access:
    found = Table.model_validate({"roles": roles, "certificates": {name: [name] for name in roles}})
    return Access(found, Limits())


def test_a_caller_has_the_rights_of_all_its_names_and_the_most_generous_limit() -> None:
    """A name that the table does not know gives nothing; 0 is no limit."""
    reserve, place = {"calls": [RESERVE]}, {"calls": [PLACE.removeprefix("/")]}
    access = table(a=reserve | {"calls_per_second_max": 5}, b=place | {"calls_per_second_max": 7}, c=reserve)
    assert access.of_certificate(["a", "b", "stranger"]).calls == {f"/{RESERVE}", PLACE}
    assert access.of_certificate(["a", "b"]).limits.calls_per_second_max == 7
    assert access.of_certificate(["a", "c"]).limits.calls_per_second_max == 0
    assert access.of_certificate(["stranger"]).calls == frozenset()


def test_who_is_not_in_the_table_may_call_nothing() -> None:
    """A certificate without a role is forbidden everything; a call without a certificate is of nobody."""
    admission = Admission(table(shop={"calls": [RESERVE]}), None, Limits())
    admission.enter(f"/{RESERVE}", Call("shop"))
    forbidden = refused(lambda: admission.enter(PLACE, Call("shop")))
    assert (forbidden.reason, forbidden.metadata) == ("CALLER_FORBIDDEN", {"method": PLACE.removeprefix("/")})
    assert refused(lambda: admission.enter(f"/{RESERVE}", Call("stranger"))).reason == "CALLER_FORBIDDEN"
    assert refused(lambda: admission.enter(f"/{RESERVE}", Call())).reason == "CALLER_UNKNOWN"


@pytest.mark.parametrize("reason", ["CALLER_UNKNOWN", "CALLER_FORBIDDEN", "CALLER_OVER_LIMIT"])
def test_what_inventory_says_of_reservation_is_not_told_to_its_callers(reason: str) -> None:
    """They are not the ones who may not: for them inventory cannot be reached."""
    told = grpc.aio.Metadata((DETAILS_KEY, ERRORS.details(Refusal(reason, "no", retry_seconds="0.5"))))
    error = grpc.aio.AioRpcError(grpc.StatusCode.PERMISSION_DENIED, grpc.aio.Metadata(), told, "no", "")
    assert _unreachable(error).reason == "INVENTORY_UNAVAILABLE"


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_bucket_holds_a_second_and_fills_at_its_rate() -> None:
    """Ten at once, then one each tenth of a second; a refusal says when, and coming then is let in."""
    now = 100.0
    admission = Admission(None, None, Limits(calls_per_second_max=10), lambda: now)
    for _ in range(10):
        admission.enter(PLACE, Call()).leave()
    over = refused(lambda: admission.enter(PLACE, Call()))
    assert (over.reason, over.metadata["limit"]) == ("CALLER_OVER_LIMIT", "calls_per_second_max")
    assert float(over.metadata["retry_seconds"]) == pytest.approx(0.1)
    now += 0.1001
    admission.enter(PLACE, Call())
    assert refused(lambda: admission.enter(PLACE, Call())).reason == "CALLER_OVER_LIMIT"
    admission.enter(PLACE, Call(peer="ipv4:10.0.0.2:4711"))
    now += 3600
    for _ in range(10):
        admission.enter(PLACE, Call())
    refused(lambda: admission.enter(PLACE, Call()))


def test_calls_in_flight_are_bounded_and_given_back() -> None:
    """The third waits for one of two to end; ports of one address are one caller."""
    admission = Admission(None, None, Limits(in_flight_calls_max=2))
    first = admission.enter(PLACE, Call(peer="ipv4:10.0.0.1:1"))
    admission.enter(PLACE, Call(peer="ipv4:10.0.0.1:2"))
    assert refused(lambda: admission.enter(PLACE, Call())).metadata["limit"] == "in_flight_calls_max"
    first.leave()
    admission.enter(PLACE, Call())


def test_callers_are_kept_in_bounded_number_and_the_one_longest_unused_goes() -> None:
    """A crowd of addresses takes no memory without end; who calls stays known."""
    admission = Admission(None, None, Limits(in_flight_calls_max=1))
    admission.enter(PLACE, Call(peer="ipv4:1.1.1.1:1"))
    for number in range(CALLERS_MAX + 10):
        admission.enter(PLACE, Call(peer=f"ipv4:crowd-{number}:1"))
        if number % 1000 == 0:
            refused(lambda: admission.enter(PLACE, Call(peer="ipv4:1.1.1.1:1")))
    assert len(admission._callers) == CALLERS_MAX


# -- tokens -----------------------------------------------------------------------------------------------------------


def jwks(**keys: Any) -> str:
    made = []
    for key_id, key in keys.items():
        algorithm = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}
        name = next((name for kind, name in algorithm.items() if isinstance(key, kind)), "EdDSA")
        one = json.loads(jwt.get_algorithm_by_name(name).to_jwk(key.public_key()))
        made.append(one | {"kid": key_id, "use": "sig"})
    return json.dumps({"keys": made})


def claims(**more: Any) -> dict[str, Any]:
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": "checkout", "exp": time.time() + 3600} | more


def signed(algorithm: str = "ES256", key: Any = None, **more: Any) -> str:
    return jwt.encode(claims(**more), key or SIGNERS[algorithm], algorithm, headers={"kid": algorithm})


def part(content: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def by_public_key() -> str:
    """HS256 with the text of the public key as the shared secret."""
    public = SIGNERS["RS256"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    content = f"{part({'alg': 'HS256', 'kid': 'RS256'})}.{part(claims())}"
    signature = hmac.new(public, content.encode(), hashlib.sha256).digest()
    return f"{content}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "jwks.json"
    file.write_text(jwks(**SIGNERS))
    return file


@pytest.fixture
def verifier(keys: Path) -> Tokens:
    return Tokens(ISSUER, AUDIENCE, tokens.watch(str(keys)))


@pytest.mark.parametrize("algorithm", SIGNERS)
def test_a_token_says_who_calls(verifier: Tokens, algorithm: str) -> None:
    """By each algorithm; `roles` is a list, `scope` has spaces; the second look needs no key."""
    token = signed(algorithm, roles=["shop", 7], scope="analyst openid")
    for _ in range(2):
        found = verifier.verify(token)
        assert (found.subject, found.roles) == ("checkout", ("shop", "analyst", "openid"))


@pytest.mark.parametrize(
    "token",
    [
        signed(iss="https://another.example"),
        signed(aud="another"),
        signed(aud=["another", "third"]),
        signed(exp=time.time() - 60),
        signed(nbf=time.time() + 3600),
        signed(sub=7),
        signed(key=ec.generate_private_key(ec.SECP256R1())),
        jwt.encode({name: value for name, value in claims().items() if name != "exp"}, SIGNERS["ES256"], "ES256"),
        jwt.encode({name: value for name, value in claims().items() if name != "aud"}, SIGNERS["ES256"], "ES256"),
        jwt.encode(claims(), SIGNERS["ES256"], "ES256", headers={"kid": "unknown"}),
        jwt.encode(claims(), SIGNERS["ES256"], "ES256", headers={"kid": "RS256"}),
        jwt.encode(claims(), SIGNERS["RS256"], "RS512", headers={"kid": "RS256"}),
        jwt.encode(claims(), "", "none"),
        f"{part({'alg': 'none', 'kid': 'ES256'})}.{part(claims())}.",
        f"{part({'alg': 'HS256', 'kid': ['x']})}.{part(claims())}.AAAA",
        by_public_key(),
        signed()[:-4] + "AAAA",
        signed() + "x" * tokens.CHARACTERS_MAX,
        "nonsense",
        "",
        "\ud800",
    ],
    ids=[
        "issuer", "audience", "audiences", "expired", "not yet", "subject", "other key", "no exp", "no aud",
        "unknown kid", "kid of another", "RS512", "none", "none with kid", "bad kid", "HS256 by the public key",
        "signature", "long", "nonsense", "empty", "surrogate",
    ],
)  # fmt: skip
def test_what_is_not_valid_is_refused(verifier: Tokens, token: str) -> None:
    """Another audience, issuer or key, out of its time, unsigned, or signed by what is no secret."""
    with pytest.raises(InvalidTokenError):
        verifier.verify(token)


def test_a_remembered_token_ends_with_its_time_and_with_its_key(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Being remembered makes no token live longer, and memory is bounded."""
    monkeypatch.setattr(files, "LOOK_SECONDS", 0)
    monkeypatch.setattr(tokens, "TOKENS_MAX", 3)
    now = time.time()
    verifier = Tokens(ISSUER, AUDIENCE, tokens.watch(str(keys)), lambda: now)
    token = signed(exp=now + 60)
    verifier.verify(token)
    for number in range(5):
        verifier.verify(signed(jti=str(number)))
    assert len(verifier._known) == 3
    verifier.verify(token)
    now += 60 + tokens.LEEWAY_SECONDS
    with pytest.raises(InvalidTokenError):
        verifier.verify(token)
    now -= 60
    verifier.verify(token)
    keys.write_text(jwks(RS256=SIGNERS["RS256"], EdDSA=SIGNERS["EdDSA"]))
    with pytest.raises(InvalidTokenError):
        verifier.verify(token)
    verifier.verify(signed("EdDSA"))
    for other in ("half of it {", '["keys"]', '{"keys": ["kid"]}', '{"keys": [null]}'):
        keys.write_text(other)
        verifier.verify(signed("RS256"))


def test_a_token_counts_and_the_certificate_behind_it_does_not(verifier: Tokens) -> None:
    """A gateway that passes a token on gives its caller none of its own rights; a bad token gets nothing."""
    access = Access(
        Table.model_validate(
            {
                "roles": {
                    "shop": {"calls": [RESERVE], "tokens": True},
                    "holds": {"calls": [PLACE.removeprefix("/")]},
                },
                "certificates": {"gateway": ["holds"]},
                "subjects": {"stock-keeper": ["holds"]},
            }
        ),
        Limits(),
    )
    admission = Admission(access, verifier, Limits())
    admission.enter(PLACE, Call("gateway"))
    admission.enter(f"/{RESERVE}", Call("gateway", token=signed(scope="shop")))
    admission.enter(PLACE, Call("gateway", token=signed(sub="stock-keeper")))
    for token in (signed(scope="shop"), signed(sub="gateway"), signed(roles=["holds"])):
        call = Call("gateway", token=token)
        assert refused(partial(admission.enter, PLACE, call)).reason == "CALLER_FORBIDDEN"
    unknown = refused(lambda: admission.enter(PLACE, Call("gateway", token=signed(aud="x"))))
    assert (unknown.reason, unknown.message) == ("CALLER_UNKNOWN", "the token is not valid")


def test_a_subject_has_one_bucket_whatever_its_tokens_name_and_each_has_its_own_rights(verifier: Tokens) -> None:
    """More roles, or the same in another order, are no more calls; and no token has the rights of another."""
    shop = {"calls": [RESERVE], "tokens": True, "calls_per_second_max": 2, "in_flight_calls_max": 2}
    place = {"calls": [PLACE.removeprefix("/")], "tokens": True, "calls_per_second_max": 2, "in_flight_calls_max": 2}
    now = 100.0
    admission = Admission(table(shop=shop, place=place), verifier, Limits(), lambda: now)

    def enter(method: str, scope: str, **more: Any) -> Caller:
        return admission.enter(method, Call("gateway", token=signed(scope=scope, **more)))

    first, _ = enter(f"/{RESERVE}", "shop a"), enter(f"/{RESERVE}", "a shop")
    for scope in ("shop b", "shop place", "shop a"):
        over = refused(partial(enter, f"/{RESERVE}", scope))
        assert (over.reason, over.metadata["limit"]) == ("CALLER_OVER_LIMIT", "in_flight_calls_max")
    enter(f"/{RESERVE}", "shop", sub="another")
    first.leave()
    assert refused(partial(enter, f"/{RESERVE}", "shop b")).metadata["limit"] == "calls_per_second_max"
    now += 1
    enter(PLACE, "shop place").leave()
    for scope in ("shop", "shop a", "nothing", *map(str, range(RIGHTS_MAX))):
        assert refused(partial(enter, PLACE, scope)).reason == "CALLER_FORBIDDEN"
    enter(PLACE, "place shop")
    assert len(admission._callers) == 2
    assert all(len(caller._rights) <= RIGHTS_MAX for caller in admission._callers.values())


# -- files and settings -----------------------------------------------------------------------------------------------


def test_certificates_change_by_a_link_and_half_of_a_pair_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes does it, and as a tool that writes file by file does."""
    monkeypatch.setattr(files, "LOOK_SECONDS", 0)
    authority = Authority()
    versions = [authority.issue(tmp_path / f"..{number}", "inventory") for number in range(3)]
    (tmp_path / "..data").symlink_to(versions[0].name)
    for name in tls.FILES:
        (tmp_path / name).symlink_to(f"..data/{name}")
    watched = tls.watch(str(tmp_path))
    first = watched.current()
    assert watched.current() is first
    (tmp_path / "..new").symlink_to(versions[1].name)
    (tmp_path / "..new").rename(tmp_path / "..data")
    second = watched.current()
    assert second.chain == (versions[1] / "tls.crt").read_bytes()
    (versions[1] / "tls.crt").write_bytes((versions[2] / "tls.crt").read_bytes())
    assert watched.current() is second
    (versions[1] / "tls.key").write_bytes((versions[2] / "tls.key").read_bytes())
    assert watched.current().chain == (versions[2] / "tls.crt").read_bytes()
    (versions[1] / "tls.key").unlink()
    assert watched.current().chain == (versions[2] / "tls.crt").read_bytes()


@pytest.mark.parametrize(
    ("address", "answer"),
    [
        ("127.0.0.1:1", True), ("127.9.9.9:1", True), ("[::1]:1", True), ("localhost:1", True), ("unix:/tmp/x", True),
        ("0.0.0.0:1", False), ("[::]:1", False), ("10.0.0.1:1", False), ("*:1", False), (":1", False), ("pod:1", False),
    ],
)  # fmt: skip
def test_what_is_loopback(address: str, answer: bool) -> None:
    """What others can reach is not."""
    assert loopback(address) is answer


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"LISTEN": "0.0.0.0:50051"}, "HOLDFAST_LISTEN: 0.0.0.0:50051 is not loopback: set HOLDFAST_TLS_DIRECTORY"),
        ({"ACCESS_FILE": ACCESS}, "HOLDFAST_ACCESS_FILE and HOLDFAST_JWT_* need HOLDFAST_TLS_DIRECTORY"),
        ({"JWT_ISSUER": "x"}, "HOLDFAST_ACCESS_FILE and HOLDFAST_JWT_* need HOLDFAST_TLS_DIRECTORY"),
        ({"TLS_DIRECTORY": "TLS"}, "HOLDFAST_ACCESS_FILE: is needed with HOLDFAST_TLS_DIRECTORY"),
        ({"TLS_DIRECTORY": "/nowhere", "ACCESS_FILE": ACCESS}, "HOLDFAST_TLS_DIRECTORY: [Errno 2]"),
        ({"TLS_DIRECTORY": "MIXED", "ACCESS_FILE": ACCESS}, "tls.key is not the key of tls.crt"),
        ({"TLS_DIRECTORY": "TLS", "ACCESS_FILE": "/nowhere"}, "HOLDFAST_ACCESS_FILE: [Errno 2]"),
        ({"TLS_DIRECTORY": "TLS", "ACCESS_FILE": ACCESS, "JWT_ISSUER": "x"}, "go together"),
        (
            {"TLS_DIRECTORY": "TLS", "ACCESS_FILE": ACCESS, "JWT_ISSUER": "x", "JWT_AUDIENCE": "y",
             "JWKS_FILE": ACCESS},
            "HOLDFAST_JWKS_FILE: must be a JSON Web Key Set",
        ),
    ],
)  # fmt: skip
def test_what_would_be_open_by_mistake_does_not_start(
    settings: dict[str, str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says which variable, and what to do."""
    good, other = Authority().issue(tmp_path / "TLS", "a"), Authority().issue(tmp_path / "other", "a")
    mixed = Authority().issue(tmp_path / "MIXED", "a")
    (mixed / "tls.key").write_bytes((other / "tls.key").read_bytes())
    directories = {"TLS": str(good), "MIXED": str(mixed)}
    for name, value in ({"DATABASE_DSN": "postgresql://x"} | settings).items():
        monkeypatch.setenv(f"HOLDFAST_{name}", directories.get(value, value))
    with pytest.raises(SystemExit) as ended:
        load(Settings)
    line = str(ended.value)
    assert line.startswith("bad settings: ")
    assert why in line
    assert "\n" not in line


def test_everybody_is_served_only_where_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOLDFAST_INSECURE=true."""
    for name, value in {"DATABASE_DSN": "postgresql://x", "LISTEN": "0.0.0.0:1", "INSECURE": "true"}.items():
        monkeypatch.setenv(f"HOLDFAST_{name}", value)
    assert load(Settings).insecure
