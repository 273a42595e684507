"""Messages reach real receivers, once for who looks at the key, in order, and whatever the receivers do."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from aiohttp import web
from aiosmtpd.smtp import SMTP
from holdfast.analytics.v1 import notification_pb2 as pb

from services.analytics import alerts, delivery, desk
from services.analytics.alerting import Kind, Outcome, Rule, Severity
from services.analytics.channels import Channel, Message
from services.analytics.channels.webhook import Webhook
from services.analytics.delivery import Claim, Sender
from services.analytics.domain import Reason
from services.analytics.notification_servicer import NotificationServicer
from services.analytics.notification_workers import NotificationWorkers
from services.analytics.settings import Settings
from shared.database import Database
from shared.refusal import Refusal
from tests.integration.test_alerts import Shelf, rows

NOSTR_KEY = "01" * 32
SECONDS_MAX = 15  # for what must come at all
SECRET = "whsec_" + base64.b64encode(b"a key of thirty-two bytes, no less"[:32]).decode()
# Where senders run by themselves. Otherwise what has failed waits until a test says that it is due.
QUICK = {"notify_backoff_seconds": 0.01, "notify_backoff_seconds_max": 0.05}
WARNING = Rule("lag", Kind.LAG, Severity.WARNING, 60, 10)
CRITICAL = Rule("drift", Kind.DRIFT, Severity.CRITICAL)
STATES = pb.DeliveryState
Context: Any = None  # the servicer does not look at it


class Request(NamedTuple):
    """What the HTTP server was sent, and what it answered: 0 for nothing."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def key(self) -> str:
        return self.headers.get("webhook-id", "")

    @property
    def content(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.body)
        return loaded


class Hang:
    """A step of a plan: no answer until it is released, and then 200."""

    def __init__(self) -> None:
        self.reached, self.released = asyncio.Event(), asyncio.Event()


DROP = 0  # a step of a plan: the connection is cut, and nobody knows whether the message was taken
Step = int | Hang | tuple[int, dict[str, str]]


class Server:
    """An HTTP server that answers each path by its plan, step by step, and then 200."""

    def __init__(self) -> None:
        self.plans: defaultdict[str, deque[Step]] = defaultdict(deque)
        self.requests: list[Request] = []
        self.came: asyncio.Queue[Request] = asyncio.Queue()
        self.port = 0

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Server"]:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            for plan in self.plans.values():
                for step in plan:
                    if isinstance(step, Hang):
                        step.released.set()
            await runner.cleanup()

    def plan(self, path: str, *steps: Step) -> None:
        self.plans[path].extend(steps)

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}/{path}"

    async def next(self, count: int = 1) -> list[Request]:
        """The next requests that it comes to answer."""
        async with asyncio.timeout(SECONDS_MAX):
            return [await self.came.get() for _ in range(count)]

    def taken(self, path: str) -> list[Request]:
        return [one for one in self.requests if one.path == path and one.status == 200]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path, body = request.match_info["path"], await request.read()
        step = self.plans[path].popleft() if self.plans[path] else 200
        headers: dict[str, str] = {}
        if isinstance(step, tuple):
            step, headers = step
        status = DROP if isinstance(step, Hang) else step
        seen = Request(path, {name.lower(): value for name, value in request.headers.items()}, body, status)
        self.requests.append(seen)
        if isinstance(step, Hang):
            step.reached.set()
            await step.released.wait()
        self.came.put_nowait(seen)
        if step == DROP:
            assert request.transport
            request.transport.abort()
        return web.Response(status=status or 200, headers=headers, text=f"an answer that quotes {SECRET}")


class Mailbox:
    """What aiosmtpd hands on; it answers by its plan, and then 250."""

    def __init__(self) -> None:
        self.plan: deque[str] = deque()
        self.mails: asyncio.Queue[EmailMessage] = asyncio.Queue()
        self.asked = 0
        self.port = 0

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:  # noqa: N802 - aiosmtpd's name
        self.asked += 1
        if self.plan:
            return self.plan.popleft()
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        mail = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.put_nowait(mail)
        return "250 OK"

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Mailbox"]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: SMTP(self, hostname="localhost", loop=loop), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()


class Watched(Sender):
    """A sender that says what it has recorded."""

    def __init__(self, settings: Settings, database: Database, adapters: dict[str, Channel]) -> None:
        super().__init__(settings, database, adapters)
        self.recorded: asyncio.Queue[tuple[str, Outcome]] = asyncio.Queue()

    async def record(self, claim: Claim, outcome: Outcome) -> None:
        await super().record(claim, outcome)
        self.recorded.put_nowait((claim.delivery_id, outcome))

    async def outcomes(self, count: int) -> list[str]:
        """The errors of the next attempts that it records."""
        async with asyncio.timeout(SECONDS_MAX):
            return [(await self.recorded.get())[1].error for _ in range(count)]


class Post:
    """Alerts, subscriptions and senders on one database."""

    def __init__(self, database: Database, server: Server, mailbox: Mailbox, directory: Path) -> None:
        self.database, self.server, self.mailbox = database, server, mailbox
        self.directory = directory
        self.adapters: dict[str, Channel] = {}
        self._all: list[dict[str, Channel]] = []
        self._requests = 0
        self.set()

    def set(self, **settings: Any) -> None:
        """Other settings than those of most tests."""
        default: dict[str, Any] = {
            "notify_poll_seconds": 0.01, "notify_backoff_seconds": 600, "notify_backoff_seconds_max": 900,
            "notify_circuit_failures_max": 1_000, "notify_minute_messages_max": 1_000, "notify_attempts_max": 8,
            "notify_send_seconds_max": SECONDS_MAX, "notification_directory": str(self.directory),
            "webhook_private": True, "smtp_host": "127.0.0.1", "smtp_port": self.mailbox.port, "smtp_starttls": False,
            "smtp_from": "holdfast@shop.example",
        }  # fmt: skip
        self.settings = Settings(database_dsn="postgresql://unused", **(default | settings))
        self.adapters = delivery.channels(self.settings)
        self._all.append(self.adapters)
        self.api = NotificationServicer(self.settings, self.database, self.adapters)
        self.sender = self.another()

    def another(self) -> Watched:
        return Watched(self.settings, self.database, self.adapters)

    async def close(self) -> None:
        for adapters in self._all:
            for adapter in adapters.values():
                await adapter.close()

    def request_id(self) -> str:
        self._requests += 1
        return f"request-{self._requests}"

    # -- what happens

    async def subscribe(self, name: str = "s", path: str = "", **wanted: Any) -> pb.Subscription:
        """A subscription; to a webhook at a path of the server unless another channel is given."""
        if path:
            wanted["webhook"] = pb.WebhookChannel(url=self.server.url(path), secret=SECRET)
        asked = pb.CreateSubscriptionRequest(
            request_id=self.request_id(), subscription=pb.Subscription(subscription_id=name, **wanted)
        )
        return (await self.api.CreateSubscription(asked, Context)).subscription

    async def tell(self, *values: float, key: str = "k", rule: Rule = WARNING) -> None:
        """A measurement after another, each a step of the alert of a key."""
        for value in values:
            made = await self.database.run(
                lambda connection, value=value: alerts.judge_system(connection, rule.kind, {key: value})  # type: ignore[misc]
            )
            assert made == 1

    async def dispatch(self) -> None:
        """Turn every event into deliveries, and digests whose time has come into messages, and stop."""
        while await self.database.run(lambda connection: delivery.dispatch(connection, 8)):
            pass
        await delivery.digests(self.database, 8)

    async def send(self) -> list[str]:
        """Send what may be sent now, and no more; the errors of the attempts, in order."""
        self.sender._stopping = False
        for target in await self.sender._free():
            await self.sender._serve(target)
        return [self.sender.recorded.get_nowait()[1].error for _ in range(self.sender.recorded.qsize())]

    @asynccontextmanager
    async def running(self, *senders: Sender) -> AsyncIterator[None]:
        """The dispatcher and the senders as a pod runs them; in the end what is being sent is finished."""
        works = [one.run for one in senders or (self.sender,)]
        dispatchers = [NotificationWorkers(self.settings, self.database, self.adapters).works()["dispatcher"]]
        tasks = [asyncio.ensure_future(work()) for work in [*works, *(dispatchers * len(works))]]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended

    # -- what there is

    async def execute(self, statement: str, *parameters: object) -> None:
        async with self.database.connection() as connection:
            await connection.execute(statement, *parameters)

    async def now_due(self) -> None:
        """Backoff, quiet hours and periods end."""
        await self.execute("UPDATE desk.delivery SET due_at = now() WHERE settled_at IS NULL")

    async def leases_end(self) -> None:
        await self.execute("UPDATE desk.target SET lease_until = now() - interval '1 second' WHERE lease IS NOT NULL")

    async def circuits_end(self) -> None:
        await self.execute("UPDATE desk.target SET open_until = now() - interval '1 second'")

    async def deliveries(self, **filters: Any) -> list[pb.Delivery]:
        """The first made comes first."""
        answer = await self.api.ListDeliveries(pb.ListDeliveriesRequest(page_size=1_000, **filters), Context)
        return sorted(answer.deliveries, key=lambda one: (one.alert_id, one.alert_version))

    async def states(self) -> Counter[str]:
        return Counter(STATES.Name(one.state).removeprefix("DELIVERY_STATE_") for one in await self.deliveries())

    async def spared_seconds(self) -> float:
        """For how long a target is left alone, where there is one."""
        found = await rows(
            self.database, "SELECT extract(epoch FROM open_until - now())::float8 AS seconds FROM desk.target"
        )
        return float(found[0]["seconds"])


@pytest.fixture
async def post(analytics_db: Database, tmp_path: Path) -> AsyncIterator[Post]:
    async with Server().run() as server, Mailbox().run() as mailbox:
        made = Post(analytics_db, server, mailbox, tmp_path)
        for rule in (WARNING, CRITICAL):
            await analytics_db.run(lambda connection, rule=rule: desk.create_rule(connection, rule))  # type: ignore[misc]
        yield made
        await made.close()


def signed(request: Request, secret: str = SECRET) -> bool:
    """The recipe of standardwebhooks.com, as a receiver writes it."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
    expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return any(
        hmac.compare_digest(one, f"v1,{expected}") for one in request.headers["webhook-signature"].split(" ")
    )  # fmt: skip


def versions(requests: Sequence[Request]) -> dict[str, list[int]]:
    """By the key of the alert, the versions that a receiver learns of, which looks at each webhook-id once."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    known = set()
    for request in requests:
        if request.key not in known:
            known.add(request.key)
            alert = request.content["alert"]
            found[alert["key"]].append(alert["version"])
    return dict(found)


# -- each message once and in order


async def test_messages_come_once_and_in_order_through_errors(post: Post) -> None:
    """A server that fails in every way first gets each step of each alert, once a key, in the order of its alert."""
    post.set(notify_send_seconds_max=2, **QUICK)
    await post.subscribe(path="hook")
    hang = Hang()
    post.server.plan("hook", 500, DROP, (429, {"Retry-After": "1"}), 500, hang, 503, 500, 200, 500)
    async with post.running():
        for step in (100, 300, 5):  # opened, updated, closed
            for key in "abcd":
                await post.tell(step, key=key)
        while len({one.key for one in post.server.taken("hook")}) < 12:
            await post.server.next()
    hang.released.set()
    taken = post.server.taken("hook")
    assert versions(post.server.requests) == versions(taken) == {key: [1, 2, 3] for key in "abcd"}
    assert len({one.key for one in taken}) == 12
    assert all(signed(one) for one in post.server.requests)
    types = {one.content["alert"]["version"]: one.content["type"] for one in taken}
    assert types == {1: "holdfast.alert.opened", 2: "holdfast.alert.updated", 3: "holdfast.alert.closed"}
    assert await post.states() == {"SENT": 12}
    errors = {one.error for made in await post.deliveries() for one in made.attempts}
    assert errors == {"HTTP_500", "HTTP_503", "HTTP_429", "ServerDisconnectedError", "TIMEOUT", ""}


async def test_a_later_message_waits_for_the_earlier_one(post: Post) -> None:
    """While an alert's first message is in backoff its second one waits; those of other alerts do not."""
    await post.subscribe(path="hook")
    await post.tell(100, 300, key="a")
    await post.tell(100, key="b")
    await post.dispatch()
    post.server.plan("hook", 500)
    await post.execute("UPDATE desk.delivery SET due_at = now() + interval '1 hour' WHERE alert_version = 2")
    assert await post.send() == ["HTTP_500", ""]
    await post.execute("UPDATE desk.delivery SET due_at = now() WHERE alert_version = 2")
    assert await post.send() == []
    await post.now_due()
    assert await post.send() == ["", ""]
    assert versions(post.server.taken("hook")) == {"a": [1, 2], "b": [1]}


async def test_a_signature_verifies(post: Post) -> None:
    """By the published recipe, for this secret and no other, with the time of the attempt and the key as its id."""
    await post.subscribe(path="hook")
    await post.tell(100)
    await post.dispatch()
    assert await post.send() == [""]
    (request,) = post.server.requests
    (sent,) = await post.deliveries()
    assert signed(request)
    assert not signed(request, "whsec_" + base64.b64encode(bytes(32)).decode())
    assert not signed(request._replace(body=request.body.replace(b"lag", b"LAG")))
    assert request.key == request.headers["idempotency-key"] == request.content["id"] == sent.delivery_id
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < SECONDS_MAX
    assert request.headers["content-type"] == "application/json"


async def test_what_asks_for_time_gets_it(post: Post) -> None:
    """Retry-After spares the target for that long, in seconds or as a date, and no longer than the longest backoff."""
    await post.subscribe(path="hook")
    await post.tell(100)
    await post.dispatch()
    date = (datetime.now(UTC) + timedelta(seconds=300)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    odd = ("soon", "Mon, 99999999999999999999 Jan 2026 00:00:00 GMT", "Thu, 01 Jan 2026 00:00:00 +99999999999999")
    for asked, least, most in (
        ("120", 100, 120),
        (date, 250, 300),
        ("86400", 850, 900),
        *((one, -1, 1) for one in odd),
    ):
        post.server.plan("hook", (429, {"Retry-After": asked}))
        assert await post.send() == ["HTTP_429"]
        assert least < await post.spared_seconds() <= most
        assert asked in odd or await post.send() == []
        await post.circuits_end()
        await post.now_due()
    assert await post.send() == [""]


# -- the dead


@pytest.mark.parametrize("status", [400, 410, 302])
async def test_what_will_never_do_is_dead_at_once(post: Post, status: int) -> None:
    """It is listed with its attempt, the next message is not held up, and RetryDelivery sends it under its key."""
    await post.subscribe(path="hook")
    elsewhere = post.server.url("elsewhere")
    post.server.plan("hook", (status, {"Location": elsewhere}))
    await post.tell(100, 300)
    await post.dispatch()
    assert await post.send() == [f"HTTP_{status}", ""]
    dead, sent = await post.deliveries()
    assert (dead.state, sent.state) == (STATES.DELIVERY_STATE_DEAD, STATES.DELIVERY_STATE_SENT)
    assert [(one.number, one.status, one.error) for one in dead.attempts] == [(1, status, f"HTTP_{status}")]
    assert dead.attempts[0].start_time.ToDatetime() <= dead.attempts[0].end_time.ToDatetime()
    assert dead.HasField("settle_time")
    assert [one.delivery_id for one in await post.deliveries(state=STATES.DELIVERY_STATE_DEAD)] == [dead.delivery_id]

    request = pb.RetryDeliveryRequest(request_id="again", delivery_id=dead.delivery_id)
    for _ in range(2):  # a retry of the retry is none
        await post.api.RetryDelivery(request, Context)
    assert await post.send() == [""]
    assert [one.key for one in post.server.requests] == [dead.delivery_id, sent.delivery_id, dead.delivery_id]
    assert [one.path for one in post.server.requests] == ["hook"] * 3
    again = (await post.deliveries())[0]
    assert again.state == STATES.DELIVERY_STATE_SENT
    assert [one.status for one in again.attempts] == [status, 200]
    with pytest.raises(Refusal) as refused:
        await post.api.RetryDelivery(pb.RetryDeliveryRequest(request_id="more", delivery_id=sent.delivery_id), Context)
    assert refused.value.reason == Reason.DELIVERY_NOT_DEAD


async def test_attempts_are_used_up_and_given_again(post: Post) -> None:
    """After as many as the settings say it is dead; a retry gives as many again."""
    post.set(**QUICK)
    await post.subscribe(path="hook")
    post.server.plan("hook", *[500] * 15)
    await post.tell(100)
    async with post.running():
        assert await post.sender.outcomes(8) == ["HTTP_500"] * 8
    (dead,) = await post.deliveries(state=STATES.DELIVERY_STATE_DEAD)
    assert (len(dead.attempts), dead.attempts_max) == (8, 8)
    request = pb.RetryDeliveryRequest(request_id=post.request_id(), delivery_id=dead.delivery_id)
    await post.api.RetryDelivery(request, Context)
    async with post.running():
        assert await post.sender.outcomes(8) == ["HTTP_500"] * 7 + [""]
    (sent,) = await post.deliveries()
    assert (sent.state, len(sent.attempts), sent.attempts_max) == (STATES.DELIVERY_STATE_SENT, 16, 16)
    assert {one.key for one in post.server.requests} == {dead.delivery_id}


# -- targets apart, and spared


async def test_a_target_that_hangs_delays_no_other(post: Post) -> None:
    """While ten targets give no answer, another one gets its messages, and two senders do not change that."""
    hangs = [Hang() for _ in range(10)]
    for n, hang in enumerate(hangs):
        await post.subscribe(f"slow-{n}", f"slow-{n}")
        post.server.plan(f"slow-{n}", hang)
    await post.subscribe("fast", "fast")
    async with post.running(post.sender, post.another()):
        await post.tell(100)
        async with asyncio.timeout(SECONDS_MAX):
            await asyncio.gather(*(hang.reached.wait() for hang in hangs))
        await post.tell(300, 5)
        came = await post.server.next(3)
        assert [one.path for one in came] == ["fast"] * 3
        assert len(post.server.requests) == 10 + 3
        for hang in hangs:
            hang.released.set()
        await post.server.next(10 * 3)
    assert await post.states() == {"SENT": 33}
    assert Counter(one.path for one in post.server.requests) == {f"slow-{n}": 3 for n in range(10)} | {"fast": 3}


async def test_a_target_that_fails_is_left_alone(post: Post) -> None:
    """After three failures in a row nothing is sent, then one message tries, and one that is taken lets all pass."""
    post.set(notify_circuit_failures_max=3, notify_circuit_seconds=600)
    await post.subscribe(path="hook")
    post.server.plan("hook", 500, 500, 500, 500)
    for key in "abcde":
        await post.tell(100, key=key)
    await post.dispatch()
    assert await post.send() == ["HTTP_500"] * 3
    assert 590 < await post.spared_seconds() <= 600
    await post.now_due()
    assert await post.send() == []
    await post.circuits_end()
    assert await post.send() == ["HTTP_500"]
    assert 590 < await post.spared_seconds() <= 600
    assert await post.send() == []
    await post.circuits_end()
    await post.now_due()
    assert await post.send() == [""] * 5
    assert await rows(post.database, "SELECT failures FROM desk.target") == [{"failures": 0}]


async def test_a_target_gets_so_many_a_minute(post: Post) -> None:
    """Whatever waits, attempts at one target stay within its rate; another target has its own."""
    post.set(notify_minute_messages_max=3)
    await post.subscribe("a", "hook")
    await post.subscribe("b", "hook", kinds=[pb.ALERT_KIND_LAG])  # the same target
    await post.subscribe("c", "other")
    for key in "xyz":
        await post.tell(100, key=key)
    await post.dispatch()
    await post.send()
    assert Counter(one.path for one in post.server.requests) == {"hook": 3, "other": 3}
    assert await post.send() == []
    await post.execute("UPDATE desk.attempt SET started_at = started_at - interval '1 minute'")
    assert await post.send() == ["", "", ""]
    assert Counter(one.path for one in post.server.requests) == {"hook": 6, "other": 3}


# -- crashes and company


async def test_a_crash_before_recording_repeats_that_message_alone(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome of one message is lost: when its lease is over it is sent again under its key, and no other is."""
    await post.subscribe(path="hook")
    await post.tell(100, 300, key="a")
    await post.tell(100, key="b")
    await post.dispatch()

    async def fail(_claim: Claim, _outcome: Outcome) -> None:
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(post.sender, "record", fail)
        assert await post.send() == []
    first = post.server.requests[0]
    assert await post.states() == {"SENDING": 1, "PENDING": 2}
    assert await post.send() == []  # the lease holds
    await post.leases_end()
    assert await post.send() == ["", "", ""]
    assert Counter(Counter(one.key for one in post.server.requests).values()) == {2: 1, 1: 2}
    assert Counter(one.key for one in post.server.requests)[first.key] == 2
    assert versions(post.server.requests) == {"a": [1, 2], "b": [1]}
    assert post.server.requests[1].body == first.body
    (lost,) = [one for one in await post.deliveries() if one.delivery_id == first.key]
    assert [one.HasField("end_time") for one in lost.attempts] == [False, True]


async def test_a_pod_killed_while_it_sends_repeats_under_the_same_key(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has the message and the pod is gone: another pod sends it again, and the receiver knows the key."""
    monkeypatch.setattr(delivery, "STOP_SECONDS_MAX", 0)
    await post.subscribe(path="hook")
    hang = Hang()
    post.server.plan("hook", hang)
    async with post.running():
        await post.tell(100, 300)
        async with asyncio.timeout(SECONDS_MAX):
            await hang.reached.wait()
    assert (await post.states())["SENDING"] == 1
    await post.leases_end()
    other = post.another()
    async with post.running(other):
        assert await other.outcomes(2) == ["", ""]
    keys = [one.key for one in post.server.requests]
    assert keys[0] == keys[1] != keys[2]
    assert len(keys) == 3
    assert [one.HasField("end_time") for one in (await post.deliveries())[0].attempts] == [False, True]


async def test_who_wakes_late_changes_nothing(post: Post) -> None:
    """A sender whose lease has passed on cannot record: the delivery and the lease are the next one's."""
    await post.subscribe(path="hook")
    await post.tell(100)
    await post.dispatch()
    (target,) = await post.sender._free()
    first = await post.sender.claim(target)
    assert first
    assert await post.another().claim(target) is None
    await post.leases_end()
    second = await post.another().claim(target)
    assert second
    assert (second.delivery_id, second.attempt) == (first.delivery_id, 2)
    await post.sender.record(first, Outcome("HTTP_400", 400, permanent=True))
    assert await post.states() == {"SENDING": 1}
    assert await rows(post.database, "SELECT lease FROM desk.target") == [{"lease": second.lease}]
    await post.sender.record(second, Outcome(status=200))
    assert await post.states() == {"SENT": 1}


async def test_two_pods_at_once_send_each_once(post: Post) -> None:
    """Three dispatchers and three senders on five targets: every message once, in order, and no key twice."""
    for n in range(5):
        await post.subscribe(f"s{n}", f"hook-{n}")
    async with post.running(post.sender, post.another(), post.another()):
        for step in (100, 300, 5):
            await asyncio.gather(*(post.tell(step, key=f"k{n}") for n in range(8)))
        await post.server.next(5 * 8 * 3)
    assert await post.states() == {"SENT": 5 * 8 * 3}
    assert set(Counter(one.key for one in post.server.requests).values()) == {1}
    for n in range(5):
        assert versions(post.server.taken(f"hook-{n}")) == {f"k{n}": [1, 2, 3] for n in range(8)}


# -- when and how


async def test_a_digest_is_one_message(post: Post) -> None:
    """Warnings gather until the period ends and are one message then; a critical one is told at once."""
    period = timedelta(hours=1)
    await post.subscribe(path="hook", digest_period=period)
    await post.tell(100, 300, key="a")
    await post.tell(100, key="b")
    await post.tell(7, rule=CRITICAL)
    await post.dispatch()
    assert await post.send() == [""]
    assert post.server.requests.pop().content["alert"]["severity"] == "CRITICAL"
    assert await post.states() == {"GATHERED": 3, "SENT": 1}
    (due,) = {one.due_time.ToDatetime(UTC) for one in await post.deliveries(state=STATES.DELIVERY_STATE_GATHERED)}
    assert timedelta() < due - datetime.now(UTC) <= period
    assert due.timestamp() % period.total_seconds() == 0
    await post.now_due()
    await post.dispatch()
    await post.dispatch()
    assert await post.send() == [""]
    (request,) = post.server.requests
    content = request.content
    assert (content["type"], content["subject"]) == ("holdfast.digest", "3 alerts")
    told = [(one["alert"]["key"], one["alert"]["version"]) for one in content["messages"]]
    assert told == [("a", 1), ("a", 2), ("b", 1)]
    assert content["body"].splitlines() == [one["subject"] for one in content["messages"]]
    assert signed(request)
    parts = await post.deliveries(state=STATES.DELIVERY_STATE_DIGESTED)
    assert {one.digest_id for one in parts} == {request.key}
    assert await post.states() == {"DIGESTED": 3, "SENT": 2}


async def test_quiet_hours_let_only_what_is_critical_through(post: Post) -> None:
    """A warning waits for their end, also one that is tried again; a critical one and a test do not."""
    now = datetime.now(UTC)
    start, end = ((now + timedelta(hours=n)).strftime("%H:%M") for n in (-2, 2))
    quiet = pb.QuietHours(start=start, end=end)
    shown = await post.subscribe(path="hook", quiet_hours=quiet)
    assert shown.quiet_hours == pb.QuietHours(start=start, end=end, time_zone="UTC")
    await post.tell(100, 300)
    await post.tell(7, rule=CRITICAL)
    await post.dispatch()
    request = pb.TestSubscriptionRequest(request_id=post.request_id(), subscription_id="s")
    test = await post.api.TestSubscription(request, Context)
    assert await post.send() == ["", ""]
    assert Counter(one.content.get("alert", {}).get("severity") for one in post.server.requests) == {
        "CRITICAL": 1, None: 1,
    }  # fmt: skip
    assert test.delivery_id in {one.key for one in post.server.requests}
    waiting = await post.deliveries(state=STATES.DELIVERY_STATE_PENDING)
    for one in waiting:
        assert timedelta(hours=1, minutes=58) < one.due_time.ToDatetime(UTC) - now <= timedelta(hours=2)
        assert not one.attempts
    await post.now_due()  # as a retry would be
    assert await post.send() == []
    await post.execute("UPDATE desk.subscription SET quiet_start = quiet_end, quiet_end = quiet_end + interval '1 h'")
    await post.now_due()
    assert await post.send() == ["", ""]
    assert versions(post.server.requests[2:]) == {"k": [1, 2]}


async def test_a_subscription_is_told_of_what_it_asks_for_in_its_words(post: Post) -> None:
    """Filters by SKU, location, kind and severity, and a template of its own beside the default."""
    template = pb.MessageTemplate(subject="${sku} at $location: $transition ($value)", body="$$ $name|$level\n\n$key")
    await post.subscribe("mine", "mine", sku_prefixes=["A"], locations=["MAIN"], template=template)
    await post.subscribe("theirs", "theirs", severity_min=pb.ALERT_SEVERITY_CRITICAL, kinds=[pb.ALERT_KIND_STOCK_OUT])
    await post.subscribe("nobody", "nobody", locations=["NORTH"])
    out = Rule("out", Kind.STOCK_OUT, Severity.CRITICAL, 1, 1)
    await post.database.run(lambda connection: desk.create_rule(connection, out))
    await Shelf(post.database, alerts.Crossings()).set(("A1", 0), ("B1", 0))
    await post.tell(100)
    await post.dispatch()
    await post.send()
    (mine,) = post.server.taken("mine")
    assert mine.content["subject"] == "A1 at MAIN: OPENED (0)"
    assert mine.content["body"] == "$ |1\n\nA1@MAIN"
    subjects = sorted(one.content["subject"] for one in post.server.taken("theirs"))
    assert subjects == [f"[CRITICAL] {sku}@MAIN: out of stock (OPENED)" for sku in ("A1", "B1")]
    assert len(post.server.requests) == 3
    with pytest.raises(Refusal) as refused:
        await post.subscribe("bad", "bad", template=pb.MessageTemplate(subject="$secret"))
    assert (refused.value.reason, refused.value.metadata) == (
        "FIELD_INVALID",
        {"field": "subscription.template.subject"},
    )


async def test_a_pause_keeps_what_waits(post: Post) -> None:
    """What waits is sent afterwards, and what happens meanwhile is not collected."""
    await post.subscribe(path="hook")
    await post.tell(100, key="before")
    await post.dispatch()
    for paused in (True, False):
        request = pb.PauseSubscriptionRequest(request_id=post.request_id(), subscription_id="s", paused=paused)
        assert (await post.api.PauseSubscription(request, Context)).subscription.paused is paused
        if paused:
            await post.tell(100, key="meanwhile")
            await post.dispatch()
            assert await post.send() == []
    assert await post.send() == [""]
    assert versions(post.server.requests) == {"before": [1]}


@pytest.mark.parametrize("under_way", [False, True])
async def test_a_deleted_subscription_is_told_nothing_more(post: Post, *, under_way: bool) -> None:
    """What waits for it is dead, its secrets are gone, and nothing brings it back; what was under way has arrived."""
    await post.subscribe(path="hook")
    await post.tell(100, 300)
    await post.dispatch()
    (target,) = await post.sender._free()
    claim = await post.sender.claim(target) if under_way else None
    delete = pb.DeleteSubscriptionRequest(request_id=post.request_id(), subscription_id="s")
    await post.api.DeleteSubscription(delete, Context)
    if claim:
        await post.another().record(claim, Outcome(status=200))
    await post.tell(700)
    await post.dispatch()
    assert await post.send() == []
    assert await post.states() == ({"DEAD": 1, "SENT": 1} if under_way else {"DEAD": 2})
    assert post.server.requests == []
    assert await rows(post.database, "SELECT config FROM desk.subscription") == [{"config": "{}"}]
    assert not (await post.api.ListSubscriptions(pb.ListSubscriptionsRequest(), Context)).subscriptions
    dead = next(one for one in await post.deliveries() if one.state == pb.DELIVERY_STATE_DEAD)
    with pytest.raises(Refusal) as refused:
        await post.api.RetryDelivery(pb.RetryDeliveryRequest(request_id="r", delivery_id=dead.delivery_id), Context)
    assert refused.value.reason == Reason.SUBSCRIPTION_DELETED


# -- the other channels


async def test_mail_arrives_and_a_full_mailbox_is_tried_again(post: Post) -> None:
    """With its subject, and a Message-ID of the key; 4xx passes, 5xx is dead."""
    shown = await post.subscribe(mail=pb.MailChannel(to="ann@shop.example"))
    assert shown.target == "mailto:ann@shop.example"
    post.set(**QUICK)
    post.mailbox.plan.append("452 mailbox full")
    await post.tell(100)
    async with post.running():
        assert await post.sender.outcomes(2) == ["SMTP_452", ""]
    mail = post.mailbox.mails.get_nowait()
    (sent,) = await post.deliveries()
    assert mail["Message-ID"] == f"<{sent.delivery_id}@shop.example>"
    assert (mail["To"], mail["From"]) == ("ann@shop.example", "holdfast@shop.example")
    assert mail["Subject"] == sent.subject == "[WARNING] analytics is 100 s behind (OPENED)"
    assert "version 1" in mail.get_content()
    assert [one.status for one in sent.attempts] == [452, 250]
    post.mailbox.plan.append("550 no such user")
    await post.tell(300)
    await post.dispatch()
    assert await post.send() == ["SMTP_550"]
    assert (await post.deliveries())[-1].state == STATES.DELIVERY_STATE_DEAD
    assert (post.mailbox.asked, post.mailbox.mails.qsize()) == (3, 0)


async def test_a_mail_server_that_is_away_is_tried_again(post: Post) -> None:
    """A mail is kept until there is a server."""
    port = post.mailbox.port
    async with Mailbox().run() as gone:
        post.set(smtp_port=gone.port)
    await post.subscribe(mail=pb.MailChannel(to="ann@shop.example"))
    await post.tell(100)
    await post.dispatch()
    assert await post.send() == ["SMTPConnectError"]
    post.set(smtp_port=port)
    await post.now_due()
    assert await post.send() == [""]
    assert post.mailbox.mails.qsize() == 1


async def test_apprise_sends_and_is_tried_again(post: Post) -> None:
    """Through a service of its own; the key is in the text, and its credentials are nowhere to be seen."""
    shown = await post.subscribe(apprise=pb.AppriseChannel(url=f"json://ann:swordfish@127.0.0.1:{post.server.port}/x"))
    assert shown.target == "json://"
    post.set(**QUICK)
    post.server.plan("x", 500)
    await post.tell(100)
    async with post.running():
        assert await post.sender.outcomes(2) == ["NOT_TAKEN", ""]
    _, request = post.server.requests
    (sent,) = await post.deliveries()
    assert request.content["title"] == sent.subject
    assert request.content["message"].splitlines()[-1] == sent.delivery_id
    post.set(webhook_private=False)
    await post.tell(300)
    await post.dispatch()
    assert await post.send() == ["PRIVATE_ADDRESS"]
    assert len(post.server.requests) == 2


async def test_files_have_a_line_for_each_message(post: Post) -> None:
    """In order, as JSON, in the directory of the settings; a name cannot lead out of it."""
    await post.subscribe(file=pb.FileChannel(name="alerts"))
    await post.tell(100, 300, 5)
    async with post.running():
        assert await post.sender.outcomes(3) == [""] * 3
    lines = [json.loads(line) for line in (post.directory / "alerts.jsonl").read_text().splitlines()]
    assert [line["type"].rpartition(".")[2] for line in lines] == ["opened", "updated", "closed"]
    assert [line["id"] for line in lines] == [one.delivery_id for one in await post.deliveries()]
    with pytest.raises(Refusal):
        await post.subscribe("bad", file=pb.FileChannel(name="../alerts"))


async def test_a_line_that_is_not_written_whole_has_not_been_taken(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is full; what comes afterwards is a line of its own."""
    await post.subscribe(file=pb.FileChannel(name="alerts"))
    await post.tell(100)
    await post.dispatch()
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda file, content: write(file, content[:5]))
        assert await post.send() == ["OSError"]
    (waiting,) = await post.deliveries()
    assert waiting.state == pb.DELIVERY_STATE_PENDING
    await post.circuits_end()
    await post.now_due()
    assert await post.send() == [""]
    cut, line = (post.directory / "alerts.jsonl").read_text().splitlines()
    assert line.startswith(cut)
    assert json.loads(line)["id"] == waiting.delivery_id


# -- what must not be reached or seen


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ("127.0.0.1", "PRIVATE_ADDRESS"), ("localhost", "PRIVATE_ADDRESS"), ("[::ffff:127.0.0.1]", "PRIVATE_ADDRESS"),
        ("0.0.0.0", "PRIVATE_ADDRESS"), ("0x7f000001", "PRIVATE_ADDRESS"), ("127.1", "URL_NOT_KNOWN"),  # noqa: S104
        ("2130706433", "URL_NOT_KNOWN"), ("127.0.0.1.", "URL_NOT_KNOWN"),
    ],
)  # fmt: skip
async def test_a_private_address_is_not_connected_to(host: str, error: str) -> None:
    """However it is written, nothing connects, and it is not tried again."""
    connected: list[object] = []

    def connect(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(host)
        writer.close()

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    config = {"url": f"http://{host}:{server.sockets[0].getsockname()[1]}/", "secret": SECRET}
    message = Message("key", "subject", "body", "{}")
    careful, free = Webhook(private=False), Webhook(private=True)
    try:
        assert await careful.send(config, message) == Outcome(error, permanent=True)
        assert connected == []
        if host == "127.0.0.1":  # the server would have told
            await free.send(config, message)
            assert connected == [host]
    finally:
        await careful.close()
        await free.close()
        server.close()


async def test_a_private_address_is_dead_at_once(post: Post) -> None:
    """As the service is set unless it is told otherwise."""
    assert Settings(database_dsn="postgresql://unused").webhook_private is False
    post.set(webhook_private=False)
    await post.subscribe(path="hook")
    await post.tell(100)
    await post.dispatch()
    assert await post.send() == ["PRIVATE_ADDRESS"]
    assert await post.states() == {"DEAD": 1}
    assert post.server.requests == []


async def test_secrets_can_be_written_and_not_read(post: Post, caplog: pytest.LogCaptureFixture) -> None:
    """Neither answers nor logs hold a secret, a URL's path, an answer or a body, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    post.set(notify_attempts_max=2, smtp_user="holdfast", smtp_password="letmein")
    port = post.server.port
    template = pb.MessageTemplate(body="an unlikely body")
    answers: list[object] = [
        await post.subscribe("hook", "token-of-hook", template=template),
        await post.subscribe(
            "apprise", apprise=pb.AppriseChannel(url=f"json://ann:swordfish@127.0.0.1:{port}/token-of-app")
        ),
        await post.subscribe("mail", mail=pb.MailChannel(to="ann@shop.example"), template=template),
    ]
    post.server.plan("token-of-hook", 500, DROP, 400)
    with structlog.testing.capture_logs() as logs:
        for value in (100, 300, 900):
            await post.tell(value)
            await post.dispatch()
            await post.send()
            await post.now_due()
            await post.send()
        answers.append(await post.api.ListSubscriptions(pb.ListSubscriptionsRequest(), Context))
        answers += (found := await post.deliveries())
        with pytest.raises(Refusal) as refused:
            await post.subscribe("bad", webhook=pb.WebhookChannel(url="http://a/", secret="whsec_hunter2"))
    errors = {one.error for made in found for one in made.attempts}
    assert {"HTTP_500", "HTTP_400"} <= errors
    assert any(log["event"] == "delivery dead" for log in logs)
    kept = [dict(row) for row in await rows(post.database, "SELECT answer, refusal FROM desk.request")]
    attempts = await rows(post.database, "SELECT * FROM desk.attempt")
    # asyncio names sockets and files alone; the parts of aiosmtplib and aiosmtpd that log are the test's server.
    lines = [record.getMessage() for record in caplog.records if not record.name.startswith("mail.log")]
    seen = "\n".join(map(str, [*answers, *logs, *lines, *kept, *attempts, refused.value, refused.value.metadata]))
    for secret in (SECRET, SECRET.removeprefix("whsec_"), "token-of-", "swordfish", "letmein", "hunter2", "quotes"):
        assert secret not in seen
    assert "an unlikely body" not in "\n".join(map(str, [*found, *logs, *lines, *attempts]))


async def test_what_is_critical_overtakes_what_waits(post: Post) -> None:
    """A backlog of one target does not keep back what must be told at once."""
    await post.subscribe(path="hook")
    for number in range(3):
        await post.tell(100, key=f"low{number}")
    await post.dispatch()
    async with post.database.connection() as connection:
        await connection.execute(
            "UPDATE desk.delivery SET urgent = true WHERE seq = (SELECT max(seq) FROM desk.delivery)"
        )
    await post.send()
    assert next(iter(versions(post.server.requests))) == "low2"


@pytest.mark.parametrize(
    "url",
    [
        "discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js/?template=/etc/passwd",
        "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/?template=http://127.0.0.1:1/meta-data",
        "SYSLOG://",
        " syslog://",
        "blink1://",
        "json://example.com/\0x",
        f"nostr://{NOSTR_KEY}/?relay=ws://127.0.0.1:6379/",
        f"nostr://{NOSTR_KEY}/?a=note;relay=ws://127.0.0.1:6379/",
        f"nostr://{NOSTR_KEY}/?%20relay=ws://127.0.0.1:6379/",
        f"nostr://{NOSTR_KEY}/#?relay=ws://127.0.0.1:6379/",
        f"nostr://{NOSTR_KEY}/?blossom=http://127.0.0.1:6379/",
        "vapid://user@example.com/x?a=b;keyfile=/etc/passwd",
        "slack://[abc",
        "json://u:p@[swordfish]/",
    ],
)
async def test_apprise_urls_that_would_read_what_is_not_theirs(post: Post, url: str) -> None:
    """Files of the machine, what only the machine can fetch, its own logs, and what is no URL: refused."""
    with pytest.raises(Refusal) as refused:
        await post.api.CreateSubscription(
            pb.CreateSubscriptionRequest(
                request_id=post.request_id(),
                subscription=pb.Subscription(subscription_id="bad", apprise=pb.AppriseChannel(url=url)),
            ),
            Context,
        )
    assert refused.value.reason == "FIELD_INVALID"
