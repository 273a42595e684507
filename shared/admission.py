"""Who is let in: who calls, whether they may, and whether they call too often.

With TLS every caller has a certificate. A caller that shows a bearer token as well is whom the token names, and
counts for nothing else: a token that is not valid is refused, whatever the certificate. What a caller may call is a
look into a set (`shared.access`). Without TLS, on loopback, everybody may call everything and callers are told apart
by their address.

Each caller has a bucket of calls that fills by `calls_per_second_max` and holds a second's worth (at least one), and
a number of calls in flight. A token's subject has one of each, whichever roles its tokens name: those decide by token
what it may call, and how fast the bucket fills. Refusing takes a fraction of what a call takes, so that a flood of one
leaves room for others. Buckets are a pod's own. CALLERS_MAX are kept; the one longest unused is forgotten, and starts
anew.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from shared.access import Access, Limits, Rights
from shared.refusal import Refusal
from shared.tokens import InvalidTokenError, Token, Tokens

CALLERS_MAX = 10_000
RIGHTS_MAX = 10  # remembered of a caller, by the roles that its tokens name
BUSY_RETRY_SECONDS = 0.1
BEARER = "bearer "
NAMES_KEY, COMMON_NAME_KEY = "x509_subject_alternative_name", "x509_common_name"


class Context(Protocol):
    """What is asked of a call: grpc.aio.ServicerContext."""

    def auth_context(self) -> Any: ...
    def invocation_metadata(self) -> Any: ...
    def peer(self) -> str: ...


class Caller:
    """What one caller has taken of its limits, and its rights by what its tokens name."""

    __slots__ = ("_in_flight", "_paid_until", "_rights")

    def __init__(self, now: float) -> None:
        self._rights: dict[tuple[str, ...], Rights] = {}
        self._paid_until = now  # each call moves it on by its share of a second; at most a second ahead
        self._in_flight = 0

    def rights(self, roles: tuple[str, ...], find: Callable[[], Rights]) -> Rights:
        """What it may by those roles; found once."""
        rights = self._rights.get(roles)
        if rights is None:
            if len(self._rights) >= RIGHTS_MAX:
                self._rights.clear()
            rights = self._rights[roles] = find()
        return rights

    def enter(self, method: str, rights: Rights | None, limits: Limits, now: float) -> None:
        """Begin a call by some rights (None: everything), to be followed by leave(). Raises Refusal."""
        if rights is not None and method not in rights.calls:
            raise Refusal("CALLER_FORBIDDEN", "the caller may not call this", method=method.removeprefix("/"))
        rate, in_flight_max = limits.calls_per_second_max, limits.in_flight_calls_max
        if in_flight_max and self._in_flight >= in_flight_max:
            raise _over("in_flight_calls_max", in_flight_max, BUSY_RETRY_SECONDS)
        if rate:
            paid_until = max(self._paid_until, now) + 1 / rate
            too_early = paid_until - now - max(1, 1 / rate)
            if too_early > 0:
                raise _over("calls_per_second_max", rate, too_early)
            self._paid_until = paid_until
        self._in_flight += 1

    def leave(self) -> None:
        self._in_flight -= 1


class Admission:
    """Lets callers in by `access` (None: everybody) and `tokens` (None: no token counts), within their limits."""

    def __init__(
        self,
        access: Access | None,
        tokens: Tokens | None,
        limits: Limits,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._access = access
        self._tokens = tokens
        self._limits = limits
        self._now = now
        self._callers: dict[object, Caller] = {}

    def unary(self, method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        """`behaviour` of a method that answers once, for those who are let in."""

        async def call(request: Any, context: Any) -> Any:
            caller = self.enter(method, context)
            try:
                return await behaviour(request, context)
            finally:
                caller.leave()

        return call

    def stream(self, method: str, behaviour: Callable[[Any, Any], AsyncIterator[Any]]) -> Any:
        """`behaviour` of a method that answers with a stream, for those who are let in."""

        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            caller = self.enter(method, context)
            try:
                async for response in behaviour(request, context):
                    yield response
            finally:
                caller.leave()

        return call

    def enter(self, method: str, context: Context) -> Caller:
        """Who calls, let in; to be left. Raises Refusal."""
        caller, rights = self._caller(context)
        caller.enter(method, rights, rights.limits if rights else self._limits, self._now())
        return caller

    def _caller(self, context: Context) -> tuple[Caller, Rights | None]:
        if self._access is None:
            return self._known(("peer", context.peer().rpartition(":")[0])), None
        access = self._access
        if token := self._token(context):
            subject, roles = token.subject, token.roles
            caller = self._known(("token", subject))
            return caller, caller.rights(roles, lambda: access.of_token(subject, roles))
        proof = context.auth_context()
        raw = tuple(proof.get(NAMES_KEY, ())) or tuple(proof.get(COMMON_NAME_KEY, ()))
        if not raw:
            raise _unknown("no certificate and no token says who calls")
        caller = self._known(raw)
        return caller, caller.rights((), lambda: access.of_certificate(name.decode(errors="replace") for name in raw))

    def _token(self, context: Context) -> Token | None:
        shown = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if not shown or self._tokens is None:
            return None
        scheme, token = str(shown[0])[: len(BEARER)], str(shown[0])[len(BEARER) :]
        if len(shown) > 1 or scheme.lower() != BEARER:
            raise _unknown("the call must show one bearer token")
        try:
            return self._tokens.verify(token)
        except InvalidTokenError:
            raise _unknown("the token is not valid") from None

    def _known(self, who: object) -> Caller:
        """The caller of that name, as the one used last."""
        caller = self._callers.pop(who, None)
        if caller is None:
            caller = Caller(self._now())
            if len(self._callers) >= CALLERS_MAX:
                del self._callers[next(iter(self._callers))]
        self._callers[who] = caller
        return caller


def _unknown(why: str) -> Refusal:
    return Refusal("CALLER_UNKNOWN", why)


def _over(limit: str, most: float, seconds: float) -> Refusal:
    return Refusal(
        "CALLER_OVER_LIMIT",
        f"the caller is over its {limit} of {most:g}; come back later",
        limit=limit,
        retry_seconds=f"{seconds:.3f}",
    )
