# SPDX-License-Identifier: Apache-2.0
"""Policy resolution: 1 000 L3 rules that all select one endpoint, 3 000 identities.

policy_resolve_warm_ms
    The map state of an endpoint with labels that no other endpoint has, while every selector is known.
policy_resolve_cold_ms
    The same from parsed rules: selectors are made and matched against the identities.
policy_identity_delta_ms
    One further identity arrives: until its entries are in the change that the agent would write.

The rules are as different as rules can be: each allows another application, three identities each, so
nothing is shared between them and the map has an entry for every identity.  Other shapes (one selector
in all rules; wide selectors; prefixes; ports) are printed as comments.

Run: python -m bench.policy_resolve [--profile]
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from bench import harness
from identity.labels import Labels
from identity.local import prefix_labels
from identity.numbers import LOCAL_FLAG
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import Policy

RULES = 1_000
IDENTITIES = 3_000
FIRST = 256
ROUNDS = 9
ENDPOINT = Labels.of({"app": "subject"})


def rules(peer: Callable[[int], str], section: str = "ingress", rest: str = "") -> list[Policy]:
    """Return one policy of one rule for each number; `peer` writes its peer field as JSON."""
    return [
        policy
        for number in range(RULES)
        for policy in parse_policies(
            f'[{{"endpointSelector": {{"matchLabels": {{"app": "subject"}}}},'
            f' "{section}": [{{{peer(number)}{rest}}}]}}]',
            "bench",
            name=f"rule-{number}",
        )
    ]


def identity(number: int) -> Labels:
    """Return labels as a compose application's service has them; three identities share an app."""
    return Labels.of(
        {
            "app": f"app-{number % RULES}",
            "env": ("prod", "stage", "test")[number % 3],
            "com.docker.compose.project": f"project-{number % 50}",
            "com.docker.compose.service": f"service-{number}",
            "holdfast.network": "holdfast",
        }
    )


def engine_with_identities() -> PolicyEngine:
    engine = PolicyEngine()
    for number in range(IDENTITIES):
        engine.upsert_identity(FIRST + number, identity(number))
    return engine


def median_ms(samples: list[float]) -> float:
    return statistics.median(samples) * 1e3


def timed(work: Callable[[], object]) -> float:
    """Return the seconds `work` took, with the collector out of the way."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    work()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed


def cold(policies: list[Policy]) -> list[float]:
    """Return samples of: rules in, endpoint in, its map out."""
    samples = []
    for _ in range(ROUNDS):
        engine = engine_with_identities()

        def work(engine: PolicyEngine = engine) -> None:
            for policy in policies:
                engine.upsert_policy(policy)
            engine.upsert_endpoint(1, ENDPOINT)
            engine.map_state(1)

        samples.append(timed(work))
    return samples


def prepared(policies: list[Policy]) -> PolicyEngine:
    engine = engine_with_identities()
    for policy in policies:
        engine.upsert_policy(policy)
    return engine


def warm(engine: PolicyEngine) -> list[float]:
    """Return samples of: a new endpoint in, its map out.  Nothing is shared with an earlier one."""
    samples = []
    for number in range(ROUNDS):
        engine.upsert_endpoint(1, Labels.of({"app": "subject", "copy": str(number)}))
        samples.append(timed(lambda: engine.map_state(1)))
        engine.delete_endpoint(1)
    return samples


def delta(engine: PolicyEngine) -> list[float]:
    """Return samples of: one new identity in, the change of the map out."""
    engine.upsert_endpoint(1, ENDPOINT)
    engine.take_changes()
    samples = []
    for number in range(100):
        new = FIRST + IDENTITIES + number
        labels = identity(number)
        started = time.perf_counter()
        engine.upsert_identity(new, labels)
        changes = engine.take_changes()
        samples.append(time.perf_counter() - started)
        if len(changes[1].upserts) != 1 or changes[1].deletes:
            raise SystemExit(f"one identity changed {changes[1]}")
    return samples


def by_app(number: int) -> str:
    return f'"fromEndpoints": [{{"matchLabels": {{"container:app": "app-{number}"}}}}]'


def shapes() -> Iterator[tuple[str, list[Policy]]]:
    """Return other shapes of 1 000 rules, for the comment lines."""
    yield "one selector in all rules", rules(lambda _: '"fromEndpoints": [{"matchLabels": {"env": "prod"}}]')
    yield (
        "selectors of 60 identities each",
        rules(
            lambda number: (
                '"fromEndpoints": [{"matchLabels": {"com.docker.compose.project": '
                f'"project-{number % 50}"}}, "matchExpressions": '
                f'[{{"key": "app", "operator": "NotIn", "values": ["x-{number}"]}}]}}]'
            )
        ),
    )
    yield "egress", rules(lambda number: by_app(number).replace("from", "to"), "egress")
    yield (
        "each on a port of its own",
        rules(by_app, rest=', "toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}]'),
    )
    yield "prefixes", rules(lambda n: f'"toCIDR": ["10.{n // 250}.{n % 250}.0/24"]', "egress")


def main() -> None:
    policies = rules(by_app)
    harness.load()
    engine = prepared(policies)
    if "--profile" in sys.argv:
        profile(engine)
        profile_cold(policies)
        return
    harness.emit("policy_resolve_warm_ms", median_ms(warm(engine)), "ms", ROUNDS)
    harness.emit("policy_resolve_cold_ms", median_ms(cold(policies)), "ms", ROUNDS)
    harness.emit("policy_identity_delta_ms", median_ms(delta(engine)), "ms", 100)
    for name, shape in shapes():
        engine = prepared(shape)
        for number, prefix in enumerate(sorted(engine.cidrs()), LOCAL_FLAG):
            engine.upsert_identity(number, prefix_labels(prefix))
        entries = warm_entries(engine)
        harness.note(
            f"{name}: warm {median_ms(warm(engine)):.2f} ms, cold {median_ms(cold(shape)):.1f} ms, "
            f"{entries} entries"
        )


def warm_entries(engine: PolicyEngine) -> int:
    engine.upsert_endpoint(1, ENDPOINT)
    entries = len(engine.map_state(1))
    engine.delete_endpoint(1)
    return entries


def profile(engine: PolicyEngine) -> None:
    """Print where a resolution of known selectors spends its time."""
    profiler = cProfile.Profile()
    for number in range(50):
        engine.upsert_endpoint(1, Labels.of({"app": "subject", "copy": str(number)}))
        profiler.enable()
        engine.map_state(1)
        profiler.disable()
        engine.delete_endpoint(1)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


def profile_cold(policies: list[Policy]) -> None:
    """Print where the way from parsed rules to the map spends its time."""
    profiler = cProfile.Profile()
    for _ in range(5):
        engine = engine_with_identities()
        profiler.enable()
        for policy in policies:
            engine.upsert_policy(policy)
        engine.upsert_endpoint(1, ENDPOINT)
        engine.map_state(1)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
