"""PostgreSQL, Redis and Kafka behind TLS and passwords, reached as the services reach them."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis.asyncio as redis
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError
from redis.exceptions import AuthenticationError, ConnectionError  # noqa: A004 - Redis's own

from deploy.local import stack as stacks
from deploy.local.certificates import Authority
from deploy.local.stack import Leash, Stack, free_port
from shared.consumer import Batch, Bury, Consumer, dead_letters
from shared.database import Database
from shared.kafka import Brokers
from shared.migrate import migrate
from shared.outbox import producer
from tests.e2e.shop import new

SSL_REQUEST_BYTES = 8


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def server_context(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    directory = authority.issue(tmp_path_factory.mktemp("server"), "backend")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return context


@pytest.fixture
def ca_file(authority: Authority, tmp_path: Path) -> Path:
    file = tmp_path / "ca.crt"
    file.write_bytes(authority.pem)
    return file


@pytest.fixture
def other_ca_file(tmp_path: Path) -> Path:
    file = tmp_path / "other.crt"
    file.write_bytes(Authority().pem)
    return file


@contextlib.asynccontextmanager
async def behind_tls(port: int, context: ssl.SSLContext, *, asked: bool = False) -> AsyncIterator[int]:
    """A port that takes TLS alone and passes on to another; `asked` as PostgreSQL is asked for it first.

    The embedded servers are built without TLS.
    """

    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            while data := await source.read(65536):
                target.write(data)
        target.close()

    async def accept(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            if asked:
                await source.readexactly(SSL_REQUEST_BYTES)
                target.write(b"S")
            await target.start_tls(context)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except (OSError, asyncio.IncompleteReadError):
            target.close()
            return
        await asyncio.gather(pipe(source, writer), pipe(reader, target))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_postgresql_is_reached_by_verified_tls(
    stack: Stack, server_context: ssl.SSLContext, ca_file: Path, other_ca_file: Path
) -> None:
    """By pods and by migrations, with what the address says; another authority or another name is refused."""
    stack.databases("behind_tls")
    server = urlsplit(stack.postgres_dsn("behind_tls"))
    assert server.port
    async with behind_tls(server.port, server_context, asked=True) as tls_port:

        def dsn(host: str, trusted: Path) -> str:
            return (
                f"postgresql://{server.username}:not%2Fasked@{host}:{tls_port}{server.path}"
                f"?sslmode=verify-full&sslrootcert={trusted}"
            )

        await migrate(dsn("127.0.0.1", ca_file), "reservation")
        database = await Database.connect(dsn("127.0.0.1", ca_file), name="test")
        async with database.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM reservation") == 0
        await database.close()
        for host, trusted in (("127.0.0.1", other_ca_file), ("localhost", ca_file)):
            with pytest.raises(ssl.SSLCertVerificationError):
                await Database.connect(dsn(host, trusted), name="test")


async def test_redis_is_reached_by_verified_tls_and_as_a_user(
    stack: Stack, server_context: ssl.SSLContext, ca_file: Path, other_ca_file: Path
) -> None:
    """With a user of its access list; a wrong password or another authority is refused."""
    async with redis.Redis.from_url(stack.redis_url) as administrator:
        await _do(administrator, "ACL", "SETUSER", "holdfast", "on", ">let/in", "~*", "+@all")
        async with behind_tls(int(stack.redis_url.rpartition(":")[2].partition("/")[0]), server_context) as port:

            def client(password: str, trusted: Path) -> redis.Redis:
                return redis.Redis.from_url(
                    f"rediss://holdfast:{password}@127.0.0.1:{port}/0?ssl_ca_certs={trusted}", retry=None
                )

            async with client("let%2Fin", ca_file) as good:
                assert await _do(good, "ACL", "WHOAMI") in {"holdfast", b"holdfast"}
            async with client("wrong", ca_file) as wrong:
                with pytest.raises(AuthenticationError):
                    await wrong.ping()
            async with client("let%2Fin", other_ca_file) as other:
                with pytest.raises(ConnectionError):
                    await other.ping()
        await _do(administrator, "ACL", "DELUSER", "holdfast")


async def _do(client: Any, *words: str) -> Any:
    return await client.execute_command(*words)


@pytest.fixture(scope="module")
def secured_kafka(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a broker of its own that takes TLS and passwords."""
    root = tmp_path_factory.mktemp("kafka")
    issued = authority.issue(root / "certificate", "kafka")
    pem = root / "broker.pem"
    pem.write_bytes((issued / "tls.key").read_bytes() + (issued / "tls.crt").read_bytes())
    plain = stacks._kafka_properties
    secured_port = free_port()

    def properties(data: Path, host: str, port: int, controller_port: int) -> str:
        secured = f"SECURED://127.0.0.1:{secured_port}"
        lines = plain(data, host, port, controller_port).splitlines()
        for number, line in enumerate(lines):
            if line.startswith(("listeners=", "advertised.listeners=")):
                lines[number] += f",{secured}"
            elif line.startswith("listener.security.protocol.map="):
                lines[number] += ",SECURED:SASL_SSL"
        login = 'org.apache.kafka.common.security.plain.PlainLoginModule required user_holdfast="let-in";'
        return "\n".join(
            (
                *lines,
                "listener.name.secured.sasl.enabled.mechanisms=PLAIN",
                f"listener.name.secured.plain.sasl.jaas.config={login}",
                "listener.name.secured.ssl.keystore.type=PEM",
                f"listener.name.secured.ssl.keystore.location={pem}",
                "",
            )
        )

    stack = Stack(root)
    stack.log.mkdir()
    stack._leash = Leash()
    stacks._kafka_properties = properties
    try:
        stack._start_kafka()
        yield secured_port
    finally:
        stacks._kafka_properties = plain
        stack.stop()


async def test_kafka_is_reached_by_verified_tls_and_as_a_user(
    secured_kafka: int, ca_file: Path, other_ca_file: Path
) -> None:
    """Sent, consumed, buried and looked at; a wrong password or another authority is refused."""
    topic = new("topic")

    def brokers(password: str, trusted: Path) -> Brokers:
        return Brokers(f"127.0.0.1:{secured_kafka}", "SASL_SSL", "PLAIN", "holdfast", password, str(trusted))

    good = brokers("let-in", ca_file)
    admin = AIOKafkaAdminClient(**good.options)
    await admin.start()
    await admin.create_topics([NewTopic(name, 1, 1) for name in (topic, f"{topic}.dlq")])
    await admin.close()
    sender = producer(good, "test")
    await sender.start()
    await sender.send_and_wait(topic, b"hello", key=b"key", partition=0)
    await sender.stop()
    seen: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    async def handle(batch: Batch, _bury: Bury) -> None:
        seen.set_result(batch.messages[0].value)

    consuming = asyncio.create_task(Consumer(good, [topic], new("group"), f"{topic}.dlq", handle).run())
    async with asyncio.timeout(30):
        assert await seen == b"hello"
    consuming.cancel()
    await asyncio.wait([consuming])
    assert await dead_letters(good, f"{topic}.dlq", limit=1) == []
    assert "let-in" not in repr(good)
    for bad in (brokers("wrong-password", ca_file), brokers("let-in", other_ca_file)):
        sender = producer(bad, "test")
        with pytest.raises(KafkaError) as refused:
            await sender.start()
        await sender.stop()
        assert "password" not in str(refused.value)
