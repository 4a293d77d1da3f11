# SPDX-License-Identifier: Apache-2.0
"""`endpoint_driver_ms`: what our network driver adds to one `docker run`.

The sum of our handlers' times from CreateEndpoint to the second EndpointOperInfo, as the agent's own
metric has them, for containers whose labels are new to the cluster, with ten rules in force that select
them.  A real etcd, a real engine, a real kernel.
"""

from __future__ import annotations

import json
import re

from bench.harness import emit_median
from tests.support.agent import AgentHost
from tests.support.host import Hub, run, wait_for

RUNS = 15
RULES = [
    {
        "endpointSelector": {"matchLabels": {"app": "web"}},
        "ingress": [
            {
                "fromEndpoints": [{"matchLabels": {"app": f"client{number}"}}],
                "toPorts": [{"ports": [{"port": str(8000 + number), "protocol": "TCP"}]}],
            }
        ],
    }
    for number in range(10)
]
_SUM = re.compile(r'holdfast_driver_seconds_sum\{method="(\w+)"\} (\S+)')


def driver_seconds(host: AgentHost) -> float:
    """Return the seconds that all driver calls took since the agent started."""
    command = ["curl", "-s", "--unix-socket", str(host.socket), "http://holdfast/v1/metrics"]
    return sum(float(value) for _, value in _SUM.findall(run(command).stdout))


def main() -> None:
    """Print the figure."""
    with Hub() as hub, AgentHost("hfbench") as host:
        host.address = hub.join(host)
        host.start_etcd()
        (host.policies / "rules.json").write_text(json.dumps(RULES))
        host.start_agent(debug="false")
        host.network()
        wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 1, "policy in force")
        host.container("warm", "sleep", "infinity", labels={"app": "web", "env": "warm"})
        samples = []
        for number in range(RUNS):
            before = driver_seconds(host)
            host.container(f"web{number}", "sleep", "infinity", labels={"app": "web", "env": f"e{number}"})
            samples.append((driver_seconds(host) - before) * 1000)
        emit_median("endpoint_driver_ms", samples, "ms")


if __name__ == "__main__":
    main()
