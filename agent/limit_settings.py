# SPDX-License-Identifier: Apache-2.0
"""The option `api-rate-limit`: which calls are limited, and how.  Names and syntax are Cilium's::

    endpoint-create=rate-limit:10/s,rate-burst:4,parallel-requests:4,max-wait-duration:15s

What is given replaces single settings of the built-in limits.  Those are above what an agent can do of each
(20 to 80 ms of CPU an endpoint), so that nothing waits for them but what would harm the rest.  Deletions have
none: one that is refused leaves an address in use.

    rate-limit          calls in a time: 10/s, 10/2m, 3.5/h
    rate-burst          how many of them at once
    parallel-requests   how many under way; 0: any number
    max-wait-duration   how long a call waits for its turn before it is refused; 0: for as long as it takes
    skip-initial        so many calls of a start pass without a look at the rate
    log                 say in the log which calls waited, and how long

Limits that adjust themselves are refused by name: under load they close, and then containers do not start.

Read by: agent.configuration, which checks; agent.limits, which acts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.errors import HoldfastError, shorten
from core.options import parse_duration


class LimitError(HoldfastError):
    """Raised for a limit that can not be used; says which call, which setting and why."""


@dataclass(frozen=True)
class Limit:
    """One call's limit: `rate` calls a second (0: any number) and seconds; the fields are the settings."""

    rate: float = 0.0
    burst: int = 0
    parallel: int = 0
    max_wait: float = 0.0
    skip_initial: int = 0
    log: bool = False


CREATE = "endpoint-create"
# The engine waits for 30 s, and the driver answers it after 20: the refusal has to come first.
LONGEST_WAIT_S, LONGEST_CREATE_WAIT_S = 3600.0, 15.0
BUILT_IN: Mapping[str, Limit] = {
    CREATE: Limit(rate=100.0, burst=500, max_wait=15.0),
    "endpoint-delete": Limit(),
    "endpoint-get": Limit(rate=200.0, burst=400, max_wait=15.0),
    "endpoint-list": Limit(rate=20.0, burst=100, max_wait=15.0),
    "policy-apply": Limit(rate=100.0, burst=500, max_wait=15.0),
}
_MOST = 1_000_000
_ADJUSTING = "limits do not adjust themselves"
_REFUSED = {
    "estimated-processing-duration": _ADJUSTING,
    "min-parallel-requests": _ADJUSTING,
    "max-parallel-requests": _ADJUSTING,
    "mean-over": _ADJUSTING,
    "delayed-adjustment-factor": _ADJUSTING,
    "max-adjustment-factor": _ADJUSTING,
    "min-wait-duration": "it would make every call wait, also an idle agent's; use rate-limit",
}
_NO_CALLS = {"endpoint-patch": "an endpoint's labels do not change while it lives"}


def limits_of(given: Mapping[str, str]) -> dict[str, Limit]:
    """Return the limit of every call; LimitError for what can not be used."""
    limits = dict(BUILT_IN)
    for call, settings in given.items():
        if call not in limits:
            reason = _NO_CALLS.get(call, f"it may be {', '.join(BUILT_IN)}")
            raise LimitError(f"there is no call {shorten(call)!r} to limit: {reason}")
        limits[call] = _replaced(call, limits[call], settings)
    return limits


def _replaced(call: str, limit: Limit, settings: str) -> Limit:
    seen: set[str] = set()
    for setting in filter(None, re.split(r"[,\s]+", settings)):
        name, colon, value = setting.partition(":")
        if not colon:
            raise LimitError(f"{call}: {shorten(setting)!r} has no ':'; a setting is name:value")
        if name in seen:
            raise LimitError(f"{call}: {shorten(name)} is given twice")
        seen.add(name)
        limit = replace(limit, **_setting(call, name, value))
    if limit.burst and not limit.rate:
        raise LimitError(f"{call}: rate-burst is of no use without rate-limit")
    if limit.rate and not limit.burst:
        limit = replace(limit, burst=1)
    longest = LONGEST_CREATE_WAIT_S if call == CREATE else LONGEST_WAIT_S
    if limit.max_wait > longest or (call == CREATE and not limit.max_wait):
        reason = "the engine must hear why before it gives up" if call == CREATE else "a call must end"
        raise LimitError(f"{call}: max-wait-duration may be up to {longest:g}s: {reason}")
    return limit


def _setting(call: str, name: str, value: str) -> dict[str, Any]:
    """Return the field of `Limit` and its value."""
    if name == "auto-adjust":
        if value.lower() != "false":
            raise LimitError(f"{call}: auto-adjust is refused: {_ADJUSTING}; set rate-limit, or leave it")
        return {}
    if name in _REFUSED:
        raise LimitError(f"{call}: {name} is refused: {_REFUSED[name]}")
    if name not in _SETTINGS:
        raise LimitError(f"{call}: unknown setting {shorten(name)!r}; known: {', '.join(_SETTINGS)}")
    field, parse, meaning = _SETTINGS[name]
    try:
        return {field: parse(value)}
    except ValueError as error:
        raise LimitError(f"{call}: {name} is {shorten(value)!r}, and must be {meaning}") from error


def _rate(text: str) -> float:
    number, slash, time = text.partition("/")
    if not slash or not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", number, re.ASCII):
        raise ValueError
    seconds = parse_duration(time if time[:1].isdigit() else f"1{time}")
    return _within(float(number) / seconds if seconds else 0.0, 1 / 86400)


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text, re.ASCII):
        raise ValueError
    return int(_within(int(text), 0))


def _burst(text: str) -> int:
    return int(_within(_count(text), 1))


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _within(value: float, low: float) -> float:
    if not low <= value <= _MOST:
        raise ValueError
    return value


_SETTINGS: Mapping[str, tuple[str, Callable[[str], object], str]] = {
    "rate-limit": (
        "rate",
        _rate,
        "calls in a time such as 10/s, 10/2m, 3.5/h; one a day to a million a second",
    ),
    "rate-burst": ("burst", _burst, f"a whole number, 1 to {_MOST}"),
    "parallel-requests": ("parallel", _count, f"a whole number, 0 to {_MOST}"),
    "max-wait-duration": ("max_wait", parse_duration, "a duration such as 500ms, 15s"),
    "skip-initial": ("skip_initial", _count, f"a whole number, 0 to {_MOST}"),
    "log": ("log", _flag, "true or false"),
}
