# SPDX-License-Identifier: Apache-2.0
"""The pace at which a process asks etcd: `qps` requests a second in the long run, ten seconds' worth at once.

A host that goes wild (containers that flap, a fault of ours) must not take etcd from all the others.  What a
host needs passes without a wait: two requests for each of 500 workloads that start at once.  A
transaction is one request however many keys it has.  Who waits is shown, and counted in a metric.

Called by: kvstore.transport, for each request about keys and members.  Leases, watches and the state of
members never wait here.
"""

from __future__ import annotations

import contextlib
import time

from core import metrics
from core.allowance import Allowance, Throttle
from core.waiting import Wait, waiting

# Seconds whose requests may come at once.
BURST_S = 10.0


class Pace:
    """See the module's text.  Owner: the loop's thread."""

    def __init__(self, qps: int) -> None:
        self.qps = qps
        self.throttle = Throttle(Allowance(qps, qps * BURST_S))
        self._shown = contextlib.ExitStack()
        self._wait: Wait | None = None

    async def turn(self) -> None:
        """Return when etcd may be asked once more."""
        if self.throttle.at_once():
            return
        began = time.monotonic()
        if self._wait is None:
            purpose = f"its turn to ask etcd: more than etcd.qps={self.qps} requests a second"
            self._wait = self._shown.enter_context(waiting("this host", purpose))
        self._wait.note = f"{self.throttle.waiting + 1} requests"
        try:
            await self.throttle.turn()
        finally:
            metrics.KVSTORE_LIMITER_WAIT_SECONDS.observe(time.monotonic() - began)
            if not self.throttle.waiting:
                self._wait = None
                self._shown.close()
