"""HTTP POST requests of JSON, signed as standardwebhooks.com says."""

import base64
import binascii
import hashlib
import hmac
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import aiohttp

from services.analytics.alerting import Outcome
from services.analytics.channels import BadConfigError, Config, Described, Message
from services.analytics.channels.addresses import PrivateAddressError, Resolver, literal, public

SECRET_PREFIX = "whsec_"  # noqa: S105 - the mark of one
SECRET_BYTES = range(24, 65)
URL_CHARACTERS_MAX = 2_000
RETRIED_4XX = frozenset({401, 403, 404, 408, 425, 429})  # as while a receiver is deployed, or its proxy
CONNECTIONS_MAX = 1_000  # the sender's own bound is tighter


class Webhook:
    """Answers of 2xx mean that it was taken. Redirects are not followed, and of answers only the head is read."""

    def __init__(self, *, private: bool) -> None:
        self._private = private
        self._session: aiohttp.ClientSession | None = None

    def describe(self, config: Config) -> Described:
        _key(config["secret"])
        url = config["url"]
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise BadConfigError("url", "is no URL") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            raise BadConfigError("url", "must be an http or https URL")
        if len(url) > URL_CHARACTERS_MAX or not url.isascii() or not url.isprintable() or " " in url:
            raise BadConfigError("url", f"must be at most {URL_CHARACTERS_MAX} printable ASCII characters")
        if parts.username is not None or parts.password is not None:
            raise BadConfigError("url", "must not have a user or password")
        return Described(url, f"{parts.scheme}://{parts.netloc}")

    async def send(self, config: Config, message: Message) -> Outcome:
        url, body = config["url"], message.content.encode()
        if not self._private and literal(host := urlsplit(url).hostname or "") and not public(host):
            return Outcome("PRIVATE_ADDRESS", permanent=True)
        try:
            async with self._client().post(
                url, data=body, headers=headers(config["secret"], message.key, body), allow_redirects=False
            ) as response:
                status, after = response.status, response.headers.get("Retry-After", "")
                response.close()
        except aiohttp.ClientConnectorDNSError:
            return Outcome("NAME_NOT_FOUND")
        except aiohttp.ClientConnectorError:
            return Outcome("CONNECTION_REFUSED")
        except PrivateAddressError:
            return Outcome("PRIVATE_ADDRESS", permanent=True)
        except aiohttp.InvalidURL:  # such as a number that is no address
            return Outcome("URL_NOT_KNOWN", permanent=True)
        except aiohttp.ClientError as error:
            return Outcome(type(error).__name__)
        if status // 100 == 2:
            return Outcome(status=status)
        # 3xx and most of 4xx say that this request will never do; 410 as well, that nobody is there any more.
        permanent = status // 100 in {3, 4} and status not in RETRIED_4XX
        return Outcome(f"HTTP_{status}", status, permanent, _seconds(after) if status in {429, 503} else None)

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A connection for each request: what a target does to one is nothing to the next.
            connector = aiohttp.TCPConnector(
                limit=CONNECTIONS_MAX, force_close=True, use_dns_cache=False,
                resolver=Resolver(private=self._private),
            )  # fmt: skip
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None)
            )
        return self._session


def headers(secret: str, key: str, body: bytes) -> dict[str, str]:
    """The headers of a request: its time is that of the attempt, its id and idempotency key are the message's."""
    now = str(int(time.time()))
    signed = hmac.new(_key(secret), f"{key}.{now}.".encode() + body, hashlib.sha256).digest()
    return {
        "Content-Type": "application/json",
        "Idempotency-Key": key,
        "webhook-id": key,
        "webhook-timestamp": now,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) not in SECRET_BYTES:
        raise BadConfigError("secret", f'must be "{SECRET_PREFIX}" and 24 to 64 bytes in base64')
    return key


def _seconds(retry_after: str) -> float | None:
    """Seconds that a Retry-After asks for, as a number or as a date."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        until = parsedate_to_datetime(retry_after)
        return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None
