"""Secrets in every setting, failures of every kind: nothing of a secret is in a log, an answer or an error."""

import asyncio
import base64
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import grpc
import pytest
from google.protobuf.message import Message
from holdfast.analytics.v1 import notification_pb2 as np
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.certificates import Authority
from deploy.local.stack import REPOSITORY, Stack, free_port
from deploy.local.supervisor import SERVICES, Service, Supervisor
from shared.client import Holdfast
from tests.e2e.shop import new
from tests.unit.test_access import AUDIENCE, ISSUER, SIGNERS, jwks, signed

SECRETS = {name: secrets.token_hex(12) for name in ("database", "redis", "kafka", "smtp")}
SUBJECT_KEY = base64.b64encode(secrets.token_bytes(32)).decode()
WEBHOOK = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
TOKEN = signed(roles=["shop"], exp=time.time() + 3600)
PLANTED = [*SECRETS.values(), SUBJECT_KEY, WEBHOOK.removeprefix("whsec_"), TOKEN, TOKEN.rpartition(".")[2]]


class Planted(Supervisor):
    """Pods whose settings have secrets that open nothing: Redis and Kafka refuse them, PostgreSQL asks for none."""

    def environment(self, service: Service) -> dict[str, str]:
        usual = super().environment(service)
        return usual | {
            "HOLDFAST_DATABASE_DSN": usual["HOLDFAST_DATABASE_DSN"].replace("@", f":{SECRETS['database']}@", 1),
            "HOLDFAST_REDIS_URL": usual["HOLDFAST_REDIS_URL"].replace("://", f"://nobody:{SECRETS['redis']}@", 1),
            "HOLDFAST_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "HOLDFAST_KAFKA_USERNAME": "nobody",
            "HOLDFAST_KAFKA_PASSWORD": SECRETS["kafka"],
            "HOLDFAST_SMTP_HOST": "127.0.0.1",
            "HOLDFAST_SMTP_PORT": str(free_port()),
            "HOLDFAST_SMTP_USER": "nobody",
            "HOLDFAST_SMTP_PASSWORD": SECRETS["smtp"],
            "HOLDFAST_SUBJECT_KEYS": f"k1={SUBJECT_KEY}",
            "HOLDFAST_LOG_LEVEL": "debug",
            "HOLDFAST_LOG_FORMAT": "console" if service.name == "reservation" else "json",
        }


@pytest.fixture(scope="module")
def planted(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    root = tmp_path_factory.mktemp("planted")
    keys = root / "jwks.json"
    keys.write_text(jwks(**SIGNERS))
    settings = {"HOLDFAST_JWT_ISSUER": ISSUER, "HOLDFAST_JWT_AUDIENCE": AUDIENCE, "HOLDFAST_JWKS_FILE": str(keys)}
    services = [service._replace(database=f"planted_{service.name}", pods=1, settings=settings) for service in SERVICES]
    with Planted(stack, services=services, authority=Authority(), root=root).start() as pods:
        yield pods


@pytest.fixture
async def client(planted: Supervisor) -> AsyncIterator[Holdfast]:
    targets = (planted.targets[name] for name in ("inventory", "reservation", "analytics"))
    async with Holdfast(*targets, tls_directory=planted.tls_directory) as made:
        yield made


def read(directory: Path) -> list[str]:
    return [file.read_text() for file in directory.iterdir()]


async def failed(call: Any) -> tuple[grpc.StatusCode, str]:
    """The code of a call that must fail, and everything that its caller is told."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    return error.code(), f"{error!r} {error.initial_metadata()!r} {error.trailing_metadata()!r}"


async def test_failures_show_no_secret(planted: Supervisor, client: Holdfast, stack: Stack) -> None:
    """A lost table, a lost database, refused logins, dead targets, bad and good tokens."""
    told: list[str] = []
    database = await asyncpg.connect(stack.postgres_dsn("planted_reservation"))
    await database.execute("ALTER TABLE reservation RENAME TO elsewhere")
    await database.close()
    get = rp.GetReservationRequest(reservation_id="x")
    for token, expected in ((TOKEN, grpc.StatusCode.INTERNAL), (TOKEN[:-3], grpc.StatusCode.UNAUTHENTICATED)):
        code, text = await failed(
            client.reservation.GetReservation(get, metadata=[("authorization", f"Bearer {token}")])
        )
        assert code is expected
        told.append(text)
    code, text = await failed(client.reservation.GetReservation(get, metadata=[("authorization", f"Basic {TOKEN}")]))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    told.append(text)

    shown: list[Message] = []
    channels: list[dict[str, Any]] = [
        {"webhook": np.WebhookChannel(url=f"http://127.0.0.1:{free_port()}/", secret=WEBHOOK)},
        {"mail": np.MailChannel(to="ann@shop.example")},
    ]
    for channel in channels:
        name = new("subscription")
        wanted = np.Subscription(subscription_id=name, kinds=[np.ALERT_KIND_LAG], **channel)
        shown.append(
            await client.notifications.CreateSubscription(
                np.CreateSubscriptionRequest(request_id=new(), subscription=wanted)
            )
        )
        shown.append(
            await client.notifications.TestSubscription(
                np.TestSubscriptionRequest(subscription_id=name, request_id=new())
            )
        )
    async with asyncio.timeout(30):
        while True:
            deliveries = await client.notifications.ListDeliveries(np.ListDeliveriesRequest())
            if sum(bool(one.attempts) for one in deliveries.deliveries) == len(channels):
                break
            await asyncio.sleep(0.1)
    shown += [deliveries, await client.notifications.ListSubscriptions(np.ListSubscriptionsRequest())]

    stack.drop_database("planted_inventory")
    code, text = await failed(client.inventory.ListSkus(ip.ListSkusRequest()))
    assert code is grpc.StatusCode.UNAVAILABLE
    told.append(text)
    planted.stop()
    everything = "\n".join((*read(planted.pods[0].log.parent), *told, *map(str, shown)))
    # The failures are in it, each said by who met it.
    for sign in ("call failed", "UndefinedTableError", "working without lock", "worker starts again", "Kafka"):
        assert sign in everything, sign
    leaked = [secret for secret in PLANTED if secret in everything or quote(secret) in everything]
    assert not leaked


DSNS = [
    ("DATABASE_DSN", "postgresql://holdfast:{}/x@127.0.0.1:1/a"),
    ("DATABASE_DSN", "postgresql://holdfast:{}#x@127.0.0.1:1/a"),
    ("DATABASE_DSN", "holdfast:{}@127.0.0.1:1/a"),
    ("DATABASE_DSN", "postgresql://holdfast:{}@127.0.0.1:1/a"),
]
PODS = [
    *DSNS,
    ("REDIS_URL", "redis://:{}/x@127.0.0.1:1/0"),
    ("REDIS_URL", "http://:{}@127.0.0.1:1/0"),
    ("KAFKA_PASSWORD", "{}"),
    ("LISTEN", "0.0.0.0:1"),
]


@pytest.mark.parametrize(
    ("program", "settings"),
    [
        (["services.reservation"], [*PODS, ("SUBJECT_KEYS", "k1={}")]),
        (["services.analytics"], [*PODS, ("SMTP_PASSWORD", "{}")]),
        (["shared.migrate", "inventory"], DSNS),
    ],
    ids=["reservation", "analytics", "migrate"],
)
def test_programs_that_do_not_start_show_no_secret(program: list[str], settings: list[tuple[str, str]]) -> None:
    """Bad addresses, a database that does not answer, keys that are none; each by itself, all at once."""
    started = []
    for name, value in settings:
        secret = secrets.token_hex(12)
        environment = {
            "HOLDFAST_DATABASE_DSN": f"postgresql://holdfast:{secret}@127.0.0.1:1/a",
            "HOLDFAST_REDIS_URL": f"redis://:{secret}@127.0.0.1:1/0",
            "HOLDFAST_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "HOLDFAST_KAFKA_PASSWORD": secret,
            "HOLDFAST_SMTP_PASSWORD": secret,
            "HOLDFAST_SUBJECT_KEYS": f"k1={base64.b64encode(secret.encode()).decode()}",
            "HOLDFAST_INVENTORY_TARGET": "ipv4:127.0.0.1:1",
            f"HOLDFAST_{name}": value.format(secret),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", *program], cwd=REPOSITORY, env={"PATH": ""} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append((name, value, secret, process))
    for name, value, secret, process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode, (name, value)
        assert output, (name, value)
        assert secret not in output, (name, value)
        assert base64.b64encode(secret.encode()).decode() not in output, (name, value)
