"""What keeps the worker from being ready, told once when it begins and once when it ends. Knows no HTTP and no Kafka."""

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Trouble:
    reason: str
    since: float
    why: str = ""
    told: set[str] = field(default_factory=set)
    reasons: dict[Hashable, str] = field(default_factory=dict)  # by who still has the trouble; the newest comes last


class Health:
    """The worker's troubles by the part that has them. Use it from the event loop; nothing blocks.

    ``is_alive`` answers with why inference is dead, or None; it is asked at each probe. ``when_ready`` is called the first
    time that nothing keeps the worker from being ready any more.
    """

    def __init__(
        self,
        is_alive: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        when_ready: Callable[[], None] | None = None,
    ) -> None:
        self._is_alive = is_alive
        self._clock = clock
        self._when_ready = when_ready
        self._troubles: dict[str, _Trouble] = {}

    def hold(self, part: str, reason: str) -> None:
        """Not ready for a reason that is no trouble, such as starting. Not logged."""
        self._troubles[part] = _Trouble(reason, self._clock())

    def trouble(self, part: str, reason: str, who: Hashable = None) -> None:
        """Something is wrong with a part, and is being retried. Logged once a reason until the part is well again.

        Where several do the same work, or watch the same part, ``who`` tells them apart: the part is well when each that
        had trouble is, and nobody ends the trouble of another.
        """
        known = self._troubles.get(part)
        if known is None:
            known = self._troubles[part] = _Trouble(reason, self._clock())
        known.reason = reason
        known.reasons.pop(who, None)
        known.reasons[who] = reason
        if reason not in known.told:
            known.told.add(reason)
            log.warning("%s", reason, extra={"part": part})

    def well(self, part: str, who: Hashable = None) -> None:
        """A part works, or whoever had trouble with it has gone. Logged if it had a trouble."""
        known = self._troubles.get(part)
        if known is None:
            return
        known.reasons.pop(who, None)
        if known.reasons:
            known.reason = next(reversed(known.reasons.values()))
            return
        del self._troubles[part]
        if known.told:
            seconds = self._clock() - known.since
            log.info("%s is well again", part, extra={"after_s": round(seconds, 1)})
        if not self._troubles and self._when_ready:
            self._when_ready()
            self._when_ready = None

    def is_well(self, part: str) -> bool:
        return part not in self._troubles

    def explain(self, part: str, why: str) -> None:
        """Says more of a trouble that a part has, if it still has it: one sentence, empty for nothing. It ends with it."""
        known = self._troubles.get(part)
        if known is None:
            return
        known.why = why
        if why and why not in known.told:
            known.told.add(why)
            log.warning("%s", why, extra={"part": part})

    def why_not_alive(self) -> str | None:
        """For /livez. Kafka plays no part in it: a restart does not mend a broker."""
        return self._is_alive()

    def is_in_trouble(self) -> bool:
        """Whether something is wrong, beyond what merely has not begun, or is ending."""
        return self._is_alive() is not None or any(trouble.told for trouble in self._troubles.values())

    def why_not_ready(self) -> str | None:
        """For /readyz. A trouble says more than what merely has not begun, or is ending."""
        dead = self._is_alive()
        if dead:
            return dead
        reasons = sorted(self._troubles.items(), key=lambda item: not item[1].told)
        return next((f"{part}: {'; '.join(filter(None, (each.reason, each.why)))}" for part, each in reasons), None)
