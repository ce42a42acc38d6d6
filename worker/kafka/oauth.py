"""The token by which all clients of this process log in: fetched once, shared, and renewed before it ends."""

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import orjson
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaError

from worker.printable import printable
from worker.runtime.backoff import FIRST_BACKOFF_S, LONGEST_BACKOFF_S

log = logging.getLogger(__name__)

RENEWED_AT: Final = 0.8  # of a token's life
MARGIN_S: Final = 1.0  # a token that ends sooner is not sent any more, unless it lasts for less than ten times as long
PATIENCE_S: Final = 1.0  # for the next token, where the present one is still good
MOST_CHARACTERS: Final = 200  # of what others say in a sentence of ours


class Token(NamedTuple):
    """A token, and in how many seconds it should be renewed and it ends, counted from when it was asked for."""

    value: str
    renew_in_s: float
    ends_in_s: float

    @classmethod
    def lasting(cls, value: str, seconds: float) -> "Token":
        """A token that is good for so many seconds."""
        return cls(value, RENEWED_AT * seconds, seconds)

    def __repr__(self) -> str:
        return f"a token for {self.ends_in_s} s"


class TokenUnavailable(KafkaError):  # type: ignore[misc]
    """There is no token at present. The message is a sentence without secrets; asking again may help."""

    retriable = True


class TokenRefused(TokenUnavailable):
    """Whoever issues tokens refuses to: asking again helps only after somebody has changed something."""


class TokenSource(Protocol):
    """Where tokens come from."""

    @property
    def advice(self) -> str:
        """What to look at where a broker refuses the token."""

    async def fetch(self) -> Token:
        """A token. Has a deadline of its own; raises TokenUnavailable and TokenRefused, and nothing else."""


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """Gives aiokafka's clients, which ask at each new connection, a token that is good.

    The next token is fetched when most of the present one's life is over, and the present one is given for as long as that
    takes or fails. After a failure the source is asked again after FIRST_BACKOFF_S, then ever more seldom, and at the
    latest every LONGEST_BACKOFF_S, however often clients ask. ``extensions`` go to the broker with the token (RFC 7628,
    section 3.1). ``tell`` is told why clients cannot log in, and an empty text once they can. Belongs to one event loop.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        extensions: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._extensions = dict(extensions or {})
        self._tell = tell
        self._clock = clock
        self._token = Token("", 0, 0)
        self._fetched_at = clock()
        self._renew_at = self._next_try_at = 0.0
        self._backoff_s = FIRST_BACKOFF_S
        self._failure: TokenUnavailable | None = None
        self._renewal: asyncio.Task[None] | None = None

    def extensions(self) -> dict[str, str]:
        return self._extensions

    async def token(self) -> str:
        """The token. Raises TokenUnavailable or TokenRefused, within seconds, where there is none that is good."""
        now = self._clock()
        if now >= max(self._renew_at, self._next_try_at) and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.create_task(self._renew())
        if self._renewal:  # waiting does not cancel it, for others wait for it, too
            await asyncio.wait({self._renewal}, timeout=PATIENCE_S if self._is_good() else None)
        if self._is_good():
            self._tell("")
            return self._token.value
        failure = self._failure or TokenUnavailable("there is no token yet")
        self._tell(str(failure.args[0]))
        raise type(failure)(failure.args[0])

    def reject(self) -> None:
        """A broker refuses the token, so the next one is fetched before its time, though not more often than it may be."""
        self._renew_at = min(self._renew_at, self._fetched_at + LONGEST_BACKOFF_S)

    def refusal(self, broker: str, answer: str) -> str:
        """A sentence that says that a broker refuses the token, with its answer. Of the token it tells what it is for."""
        said = printable(answer)[:MOST_CHARACTERS]
        named = ", ".join(
            f"{name} {printable(str(value))[:MOST_CHARACTERS]}"
            for name, value in claims(self._token.value).items()
            if name in ("iss", "aud", "sub", "scope")
        )
        return f"the broker {broker} refuses the token ({said}{f'; it has {named}' if named else ''}); {self._source.advice}"

    async def _renew(self) -> None:
        asked_at = self._clock()
        try:
            token = await self._source.fetch()
        except TokenUnavailable as failure:
            self._failed(failure)
            return
        except Exception as error:  # noqa: BLE001 - whatever libraries raise; its words may hold secrets
            self._failed(TokenUnavailable(f"no token can be had ({type(error).__name__}); {self._source.advice}"))
            return
        self._token, self._fetched_at = token, asked_at
        self._renew_at = asked_at + token.renew_in_s
        self._backoff_s, self._next_try_at = FIRST_BACKOFF_S, asked_at + FIRST_BACKOFF_S
        if self._failure:
            log.info("there is an OAuth token again")
        self._failure = None

    def _failed(self, failure: TokenUnavailable) -> None:
        self._next_try_at = self._clock() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        if self._is_good() and (self._failure is None or self._failure.args != failure.args):
            left_s = round(self._ends_at() - self._clock(), 1)  # without end for a token that does not say when it ends
            log.warning("the OAuth token cannot be renewed: %s", failure.args[0], extra={"token_ends_in_s": left_s})
        self._failure = failure

    def _ends_at(self) -> float:
        return self._fetched_at + self._token.ends_in_s

    def _is_good(self) -> bool:
        margin_s = min(MARGIN_S, 0.1 * self._token.ends_in_s)
        return bool(self._token.value) and self._clock() < self._ends_at() - margin_s


def claims(token: str) -> dict[str, Any]:
    """What a JSON Web Token says (RFC 7519), which nobody has verified; nothing if it is another kind of token."""
    try:
        body = token.split(".")[1]
        said = orjson.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (IndexError, binascii.Error, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def end_of(token: str) -> float | None:
    """When a JSON Web Token ends, in seconds since 1970; None if it does not say."""
    ends = claims(token).get("exp")
    return float(ends) if isinstance(ends, int | float) and not isinstance(ends, bool) else None
