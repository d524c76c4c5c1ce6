"""How often each key, each project and each address that shows bad keys may ask: token buckets in Redis, one script.

Redis is no truth of ours: while it is away nobody is held up. A key that asks often and has much left is counted here
and charged with its next look, so that its requests do not cost a look each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import redis
import structlog

from shared.settings import Settings
from shared.store.bell import BREAKER_SECONDS, plain_url

log = structlog.get_logger()

TALLY_SECONDS: Final = 0.25  # so long a key is counted without a look
_MOST_TALLIES: Final = 10_000
# Of each bucket: what it holds is what it held and what has run in since, at most a minute's worth. Whoever finds one
# of them empty takes from none, except for what it owes already (ARGV[1]). Answers: the wait in ms, then what each
# holds.
_TAKE: Final = """
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local owed, wait, held = tonumber(ARGV[1]), 0, {}
for i, key in ipairs(KEYS) do
  local minute = tonumber(ARGV[i + 1])
  local seen = redis.call('HMGET', key, 'held', 'at')
  local since = math.max(0, ms - (tonumber(seen[2]) or ms))
  held[i] = math.min(minute, (tonumber(seen[1]) or minute) + since * minute / 60000) - owed
  if held[i] < 1 then wait = math.max(wait, math.ceil((1 - held[i]) * 60000 / minute)) end
end
local answer = {wait}
for i, key in ipairs(KEYS) do
  if wait == 0 then held[i] = held[i] - 1 end
  redis.call('HSET', key, 'held', held[i], 'at', ms)
  redis.call('PEXPIRE', key, 120000)
  answer[i + 1] = math.floor(held[i])
end
return answer
"""


@dataclass(frozen=True, slots=True)
class RateReading:
    """How a caller stands after it has asked. `wait_seconds` above 0: it asked too often."""

    limit: int  # a minute's requests
    left: int
    wait_seconds: float = 0.0

    @property
    def reset_seconds(self) -> float:
        """Until everything is there again."""
        return 60 * (self.limit - self.left) / self.limit


@dataclass(slots=True)
class _Tally:
    """What a key has asked since its last look."""

    standing: RateReading
    at: float
    owed: int = 0


@dataclass
class Rates:
    """Shared by the threads of a process."""

    settings: Settings
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _tallies: dict[str, _Tally] = field(default_factory=dict)
    _silent_until: float = 0.0

    def __post_init__(self) -> None:
        url, budget = self.settings.redis_url, self.settings.ring_seconds
        self._redis: Any = (
            redis.Redis.from_url(plain_url(url), socket_timeout=budget, socket_connect_timeout=budget) if url else None
        )
        self._script: Any = None if self._redis is None else self._redis.register_script(_TAKE)

    def admit(self, *, key_id: str, project_id: str) -> RateReading | None:
        """Count a request of a key. None: nobody counts at the moment."""
        per_key, per_project = self.settings.key_requests_per_minute, self.settings.project_requests_per_minute
        buckets = {f"key:{key_id}": per_key, f"project:{project_id}": per_project}
        with self._lock:
            tally = self._tallies.get(key_id)
            if tally is not None and self._needs_no_look(tally):
                tally.owed += 1
                return RateReading(tally.standing.limit, tally.standing.left - tally.owed)
            owed = 0 if tally is None else tally.owed
            if tally is not None:
                tally.owed = 0
        standing = self._take(buckets, owed=owed)
        if standing is not None:
            with self._lock:
                if len(self._tallies) >= _MOST_TALLIES:
                    self._tallies.clear()
                self._tallies[key_id] = _Tally(standing, self.clock())
        return standing

    def _needs_no_look(self, tally: _Tally) -> bool:
        left = tally.standing.left - tally.owed
        return left > tally.standing.limit / 2 and self.clock() - tally.at < TALLY_SECONDS

    def refuse(self, address: str) -> RateReading | None:
        """Count a key that is none, shown from an address. None: nobody counts at the moment."""
        return self._take({f"address:{address}": self.settings.failed_keys_per_minute}, owed=0)

    def _take(self, buckets: dict[str, int], *, owed: int) -> RateReading | None:
        limits = {f"tunepool:rate:{name}": minute for name, minute in buckets.items() if minute}
        if self._script is None or not limits or self.clock() < self._silent_until:
            return None
        try:
            wait, *left = self._script(keys=list(limits), args=[owed, *limits.values()])
        except redis.RedisError as error:
            self._silent_until = self.clock() + BREAKER_SECONDS
            log.warning("rates.uncounted", error=str(error)[:200], silent_seconds=BREAKER_SECONDS)
            return None
        held, limit = min(zip(left, limits.values(), strict=True), key=lambda bucket: bucket[0] / bucket[1])
        return RateReading(limit, max(0, held), wait / 1000)

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()
