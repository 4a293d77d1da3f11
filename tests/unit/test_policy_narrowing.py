# SPDX-License-Identifier: Apache-2.0
"""Requirements of one rule in the peers of all, and names of ports: what the maps of endpoints get."""

from __future__ import annotations

from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import ALLOW, TCP, UDP, Direction, MapChange, Policy, PolicyKey, Transport
from tests.support.policy_reference import Verdict, lookup


def app(name: str, **more: str) -> Labels:
    return Labels.of(dict(more, app=name))


def entry(identity: int) -> PolicyKey:
    return PolicyKey(identity, 0, 0, Direction.INGRESS)


def policy_of(text: str, name: str = "p") -> Policy:
    (policy,) = parse_policies(text, "test", name=name)
    return policy


ALLOW_ALL_TO_WEB = "[{endpointSelector: {matchLabels: {app: web}}, ingress: [{fromEndpoints: [{}]}]}]"
REQUIRE_PROD = """
- endpointSelector: {}
  ingress: [{fromRequires: [{matchLabels: {env: prod}}]}]
"""


def test_requirement_of_one_policy_narrows_another_and_is_gone_with_it() -> None:
    engine = PolicyEngine()
    engine.upsert_identity(300, app("api", env="prod"))
    engine.upsert_identity(301, app("api", env="test"))
    engine.upsert_endpoint(1, app("web"))
    engine.upsert_policy(policy_of(ALLOW_ALL_TO_WEB, "allow"))
    engine.take_changes()
    everybody = entry(0)
    engine.upsert_policy(policy_of(REQUIRE_PROD, "require"))
    assert engine.take_changes() == {1: MapChange({entry(300): ALLOW}, {everybody})}
    engine.upsert_identity(302, app("new", env="prod"))
    assert engine.take_changes() == {1: MapChange({entry(302): ALLOW}, set())}
    assert "any:env=prod" in [str(each.selector) for each in engine.selectors()]
    engine.delete_policy("require")
    assert engine.take_changes() == {1: MapChange({everybody: ALLOW}, {entry(300), entry(302)})}
    assert [str(each.selector) for each in engine.selectors()] == []


def test_requirement_leaves_prefixes_entities_and_bare_ports_alone() -> None:
    engine = PolicyEngine()
    engine.upsert_identity(2, Labels.of(["reserved:world"]))
    engine.upsert_endpoint(1, app("web"))
    text = """
    - endpointSelector: {matchLabels: {app: web}}
      ingress:
      - fromRequires: [{matchLabels: {env: prod}}]
      - fromEntities: [world]
        toPorts: [{ports: [{port: 443, protocol: TCP}]}]
      - toPorts: [{ports: [{port: 80, protocol: TCP}]}]
    """
    engine.upsert_policy(policy_of(text))
    ingress = {key for key in engine.map_state(1) if key.direction is Direction.INGRESS}
    assert ingress == {
        PolicyKey(2, 443, TCP, Direction.INGRESS),
        PolicyKey(0, 80, TCP, Direction.INGRESS),
    }


def test_requirement_of_a_deny_section_narrows_the_denial() -> None:
    engine = PolicyEngine()
    engine.upsert_identity(300, app("api", env="prod"))
    engine.upsert_identity(301, app("api", env="test"))
    engine.upsert_endpoint(1, app("web"))
    text = """
    - endpointSelector: {matchLabels: {app: web}}
      ingress: [{fromEntities: [all]}]
      ingressDeny:
      - fromEndpoints: [{matchLabels: {app: api}}]
        fromRequires: [{matchLabels: {env: test}}]
    """
    engine.upsert_policy(policy_of(text))
    state = engine.map_state(1)
    assert lookup(state, 300, Transport(80, TCP), Direction.INGRESS) is Verdict.ALLOWED
    assert lookup(state, 301, Transport(80, TCP), Direction.INGRESS) is Verdict.DENIED


NAMED = """
- endpointSelector: {}
  ingress: [{toPorts: [{ports: [{port: HTTP, protocol: TCP}]}]}]
  egress: [{toEndpoints: [{matchLabels: {app: api}}], toPorts: [{ports: [{port: http}]}]}]
"""
HTTP = "holdfast.port.http"


def test_ingress_name_is_the_endpoints_own_port() -> None:
    engine = PolicyEngine()
    engine.upsert_policy(policy_of(NAMED))
    for endpoint_id, labels in ((1, {HTTP: "8080"}), (2, {HTTP: "8443/tcp"}), (3, {HTTP: "53/UDP"}), (4, {})):
        engine.upsert_endpoint(endpoint_id, app("web", **labels))
    opened = {
        endpoint_id: [key for key in engine.map_state(endpoint_id) if key.direction is Direction.INGRESS]
        for endpoint_id in (1, 2, 3, 4)
    }
    assert opened == {
        1: [PolicyKey(0, 8080, TCP, Direction.INGRESS)],
        2: [PolicyKey(0, 8443, TCP, Direction.INGRESS)],
        3: [],  # the rule speaks of TCP
        4: [],
    }


def test_egress_name_is_each_peers_port() -> None:
    engine = PolicyEngine()
    engine.upsert_policy(policy_of(NAMED))
    engine.upsert_endpoint(1, app("web"))
    engine.take_changes()
    revision = engine.revision
    for number, labels in (
        (300, app("api", **{HTTP: "8080"})),
        (301, app("api", **{HTTP: "9090"})),  # one more number for the name
        (302, app("api", **{HTTP: "8080"})),
        (303, app("db", **{HTTP: "8080"})),  # no peer
        (304, app("api")),
    ):
        engine.upsert_identity(number, labels)
    opened = {PolicyKey(300, 8080, TCP, Direction.EGRESS), PolicyKey(302, 8080, TCP, Direction.EGRESS)}
    opened.add(PolicyKey(301, 9090, TCP, Direction.EGRESS))
    assert engine.take_changes() == {1: MapChange(dict.fromkeys(opened, ALLOW), set())}
    engine.upsert_identity(301, app("api", **{HTTP: "9091/UDP"}))
    moved = {PolicyKey(301, 9091, UDP, Direction.EGRESS): ALLOW}
    assert engine.take_changes() == {1: MapChange(moved, {PolicyKey(301, 9090, TCP, Direction.EGRESS)})}
    engine.delete_identity(300)
    assert engine.take_changes() == {1: MapChange({}, {PolicyKey(300, 8080, TCP, Direction.EGRESS)})}
    assert engine.revision == revision
    engine.delete_endpoint(1)
    engine.delete_policy("p")
    assert list(engine.selectors()) == []


def test_label_that_says_no_port_opens_none() -> None:
    """The agent refuses such containers; a record of another agent in etcd may have one."""
    engine = PolicyEngine()
    engine.upsert_policy(policy_of(NAMED))
    bad = ("", "http", "0", "65536", "080", "80/", "80/ICMP", "80 ", "٨٠", "8" * 2000)
    for number, value in enumerate(bad, 300):
        engine.upsert_identity(number, app("api", **{HTTP: value}))
        engine.upsert_endpoint(number, app("web", **{HTTP: value}))
        assert dict(engine.map_state(number)) == {}
