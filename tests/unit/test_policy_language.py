# SPDX-License-Identifier: Apache-2.0
"""What the policy language means, document by document."""

from __future__ import annotations

import json
from typing import Any

from policy.language import parse_policies
from policy.model import ICMP, ICMPV6, SCTP, TCP, UDP, Clause, Direction, Enforcement, Rule, Transport
from policy.selectors import CLUSTER, WILDCARD, WORLD

CNP = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: web
  namespace: shop
  labels: {team: a}
spec:
  description: who may talk to web
  endpointSelector:
    matchLabels:
      container:app: web
  ingress:
  - fromEndpoints:
    - matchLabels:
        app: api
    toPorts:
    - ports:
      - port: "443"
        protocol: TCP
status: {}
"""


def parse_rule(**fields: Any) -> Rule:
    rule = {"endpointSelector": {}, **fields}
    return parse_policies(json.dumps(rule), "test", name="p")[0].rules[0]


def ingress(**fields: Any) -> Clause:
    return parse_rule(ingress=[fields]).clauses[0]


def egress(**fields: Any) -> Clause:
    return parse_rule(egress=[fields]).clauses[0]


def peers_of(clause: Clause) -> list[str]:
    return [str(peer) for peer in clause.peers or ()]


def ports(*listed: dict[str, Any]) -> list[Any]:
    return [{"ports": list(listed)}]


def test_cilium_network_policy() -> None:
    [policy] = parse_policies(CNP, "web.yaml")
    assert policy.name == "shop/web"
    assert policy.origin == "web.yaml"
    [rule] = policy.rules
    assert rule.description == "who may talk to web"
    assert str(rule.subject) == "container:app=web"
    assert rule.enforces == Enforcement(ingress=True, egress=False)
    [clause] = rule.clauses
    assert (clause.direction, clause.deny) == (Direction.INGRESS, False)
    assert peers_of(clause) == ["any:app=api"]
    assert clause.transports == (Transport(443, TCP),)
    assert policy.document["spec"]["description"] == "who may talk to web"


def test_clusterwide_policy_has_no_namespace() -> None:
    text = CNP.replace("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy")
    assert parse_policies(text, "t")[0].name == "web"


def test_yaml_and_json_mean_the_same() -> None:
    [policy] = parse_policies(CNP, "t")
    assert parse_policies(json.dumps(policy.document), "t") == [policy]


def test_several_documents_lists_and_specs() -> None:
    spec = "{endpointSelector: {}, egress: [{}]}"
    head = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
    first = f"{head}metadata: {{name: a}}\nspecs: [{spec}, {spec}]\n"
    second = f"{head}metadata: {{name: b}}\nspec: {spec}\n"
    found = parse_policies(f"---\n{first}---\n---\n{second}", "t")
    assert [(policy.name, len(policy.rules)) for policy in found] == [("a", 2), ("b", 1)]
    listed = {"kind": "List", "apiVersion": "v1", "items": [policy.document for policy in found]}
    assert parse_policies(json.dumps(listed), "t") == found


def test_bare_rules_are_named_by_the_caller_or_the_file() -> None:
    text = '[{"endpointSelector": {}, "ingress": [{}], "labels": ["k8s:a=b", {"key": "x", "value": "y"}]}]'
    [policy] = parse_policies(text, "file /etc/holdfast/policy/allow-web.json")
    assert policy.name == "allow-web"
    assert [str(label) for label in policy.rules[0].labels] == ["k8s:a=b", "unspec:x=y"]
    assert parse_policies(text, "standard input", name="mine")[0].name == "mine"


def test_empty_element_is_default_deny_and_nothing_else() -> None:
    rule = parse_rule(ingress=[{}], egress=[{}])
    assert rule.clauses == ()
    assert rule.enforces == Enforcement(ingress=True, egress=True)


def test_peer_fields() -> None:
    assert ingress(fromEndpoints=[{}]).peers == (WILDCARD,)
    assert ingress(fromEndpoints=[]).peers == ()
    assert ingress(fromEndpoints=[], fromCIDR=["10.0.0.1"]).peers is not None
    assert ingress(toPorts=ports({"port": "80"})).peers is None
    assert egress(toEntities=["world", "cluster", "all"]).peers == (WORLD, CLUSTER, WILDCARD)
    assert egress(toEntities=["none"]).peers == ()
    assert peers_of(egress(toEntities=["remote-node"])) == ["reserved:remote-node"]
    assert ingress(fromEndpoints=None, toPorts=ports({"port": 80})).peers is None


def test_label_sources_and_expressions() -> None:
    selector = {
        "matchLabels": {"app": "a", "any:b": "", "container:c": "x:y", "k8s:io.kubernetes.pod/n": "z"},
        "matchExpressions": [
            {"key": "env", "operator": "In", "values": ["prod", "dev", "prod"]},
            {"key": "k8s:tier", "operator": "NotIn", "values": ["db"]},
            {"key": "on", "operator": "Exists"},
            {"key": "off", "operator": "DoesNotExist", "values": []},
        ],
    }
    [text] = peers_of(ingress(fromEndpoints=[selector]))
    assert text == (
        "any:app=a,any:b=,any:env in (dev,prod),!any:off,any:on,container:c=x:y,"
        "k8s:io.kubernetes.pod/n=z,k8s:tier notin (db)"
    )


def test_prefixes() -> None:
    rule = parse_rule(egress=[{"toCIDR": ["10.1.2.3/8", "192.0.2.1", "2001:db8::/32", "0.0.0.0/0"]}])
    assert rule.cidrs == {"10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"}
    assert peers_of(rule.clauses[0]) == [
        "cidr:10.0.0.0/8",
        "cidr:192.0.2.1/32",
        "cidr:2001-db8--0/32",
        "cidr:0.0.0.0/0",
        "reserved:world",
    ]


def test_exceptions_split_a_prefix() -> None:
    cidr_set = [{"cidr": "10.0.0.0/8", "except": ["10.128.0.0/9", "10.64.0.0/10", "10.64.0.0/11"]}]
    rule = parse_rule(ingress=[{"fromCIDRSet": cidr_set}])
    assert rule.cidrs == {"10.0.0.0/10"}
    nothing = parse_rule(ingress=[{"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}]}])
    assert nothing.clauses[0].peers == ()


def test_ports() -> None:
    assert ingress(toPorts=ports({"port": "53"})).transports == (
        Transport(53, TCP),
        Transport(53, UDP),
        Transport(53, SCTP),
    )
    assert ingress(toPorts=ports({"port": 80, "protocol": "tcp"})).transports == (Transport(80, TCP),)
    both = ports({"port": "1", "protocol": "UDP"}) + ports({"port": "65535", "protocol": "UDP"})
    assert ingress(toPorts=both).transports == (Transport(1, UDP), Transport(65535, UDP))
    ranged = ingress(toPorts=ports({"port": "8000", "endPort": 8063, "protocol": "TCP"})).transports
    assert ranged == tuple(Transport(port, TCP) for port in range(8000, 8064))


def test_icmp() -> None:
    fields = [{"type": 8}, {"family": "IPv6", "type": "128"}, {"family": "IPv4", "type": 0}]
    assert ingress(icmps=[{"fields": fields}]).transports == (
        Transport(8, ICMP),
        Transport(128, ICMPV6),
        Transport(0, ICMP),
    )


def test_sections_and_default_deny() -> None:
    deny = parse_rule(ingressDeny=[{"fromEntities": ["world"]}])
    assert deny.clauses[0].deny
    assert deny.enforces == Enforcement(ingress=True, egress=False)
    relaxed = parse_rule(egressDeny=[{"toEntities": ["world"]}], enableDefaultDeny={"egress": False})
    assert relaxed.enforces == Enforcement(ingress=False, egress=False)
    stricter = parse_rule(enableDefaultDeny={"ingress": True})
    assert stricter.enforces == Enforcement(ingress=True, egress=False)
