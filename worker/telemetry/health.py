"""Whether the worker is alive and ready, and if not, why. Logs each failure once when it begins and once when it ends.

Knows neither HTTP nor Kafka: the parts of the worker report to it, and the HTTP server asks it.
"""

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _NotReady:
    """Why one part is not ready. It has failed if anything about it was logged; else it has not begun, or is ending."""

    reason: str
    since: float
    explanation: str = ""
    logged: set[str] = field(default_factory=set)
    reasons: dict[Hashable, str] = field(default_factory=dict)  # by who still reports a failure; the newest comes last


class Health:
    """The state of each part of the worker, a part being named in one word. Use it from the event loop; nothing blocks.

    ``why_not_alive`` returns why inference is dead, or None. /livez asks for nothing else: a restart does not repair a
    broker. ``when_ready`` is called once, the first time that every part is ready.
    """

    def __init__(
        self,
        why_not_alive: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        when_ready: Callable[[], None] | None = None,
    ) -> None:
        self.why_not_alive = why_not_alive
        self._clock = clock
        self._when_ready = when_ready
        self._parts: dict[str, _NotReady] = {}  # those that are not ready

    def not_ready(self, part: str, reason: str) -> None:
        """A part is not ready for a reason that is no failure, such as starting or draining. Not logged."""
        self._parts[part] = _NotReady(reason, self._clock())

    def failing(self, part: str, reason: str, who: Hashable = None) -> None:
        """A part fails, and tries again. Each reason is logged once until the part works.

        Where several do the same work, or watch the same part, ``who`` tells them apart: the part works again once each of
        them has said so, and nobody ends the failure of another.
        """
        state = self._parts.get(part)
        if state is None:
            state = self._parts[part] = _NotReady(reason, self._clock())
        state.reason = reason
        state.reasons.pop(who, None)
        state.reasons[who] = reason
        self._log_once(part, state, reason)

    def working(self, part: str, who: Hashable = None) -> None:
        """A part works, or ``who`` no longer needs it. Logged if the part was failing."""
        state = self._parts.get(part)
        if state is None:
            return
        state.reasons.pop(who, None)
        if state.reasons:
            state.reason = next(reversed(state.reasons.values()))
            return
        del self._parts[part]
        if state.logged:
            seconds = round(self._clock() - state.since, 1)
            log.info("%s: recovered after %g s", part, seconds, extra={"part": part, "after_s": seconds})
        self._tell_when_ready()

    def not_needed(self, part: str) -> None:
        """Says that nobody needs a part for now, so that the worker may be ready. Logs nothing: it may still fail."""
        if self._parts.pop(part, None):
            self._tell_when_ready()

    def _tell_when_ready(self) -> None:
        if not self._parts and self._when_ready:
            self._when_ready()
            self._when_ready = None

    def is_working(self, part: str) -> bool:
        return part not in self._parts

    def explain(self, part: str, explanation: str) -> None:
        """Adds one sentence to the reason of a part that is not ready; an empty one takes it back. Logged once."""
        state = self._parts.get(part)
        if state is None:
            return
        state.explanation = explanation
        if explanation:
            self._log_once(part, state, explanation)

    def is_failing(self) -> bool:
        """Whether inference is dead or a part fails; a part that has not begun, or is ending, does not count."""
        return self.why_not_alive() is not None or any(state.logged for state in self._parts.values())

    def why_not_ready(self) -> str | None:
        """For /readyz. A failure comes before what merely has not begun, or is ending."""
        if dead := self.why_not_alive():
            return dead
        states = sorted(self._parts.items(), key=lambda item: not item[1].logged)
        return next((f"{part}: {'; '.join(filter(None, (it.reason, it.explanation)))}" for part, it in states), None)

    def _log_once(self, part: str, state: _NotReady, sentence: str) -> None:
        if sentence not in state.logged:
            state.logged.add(sentence)
            log.warning("%s", sentence, extra={"part": part})
