# SPDX-License-Identifier: Apache-2.0
"""What a valid policy hardly means is named with its place; what it may well mean is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from policy.language import parse_policies
from policy.warnings import find_warnings
from tests.support.policy_examples import examples

WEB = {"matchLabels": {"app": "web"}}
ON_80 = {"toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}]}


def warned(**fields: Any) -> list[str]:
    """Return `path: problem` of what is doubtful in one valid rule."""
    text = json.dumps([{"endpointSelector": WEB, **fields}])
    assert parse_policies(text, "test", name="p")
    return [f"{each.path}: {each.problem}" for each in find_warnings(text, "test")]


# rule → path and words of its one warning
DOUBTFUL: dict[str, tuple[dict[str, Any], str, str]] = {
    "null peers beside ports": (
        {"ingress": [{"fromEndpoints": None, **ON_80}]},
        "[0].ingress[0].fromEndpoints",
        "everybody on its ports",
    ),
    "null peers beside types": (
        {"egressDeny": [{"toCIDR": None, "icmps": [{"fields": [{"type": 8}]}]}]},
        "[0].egressDeny[0].toCIDR",
        "everybody",
    ),
    "null labels": ({"ingress": [{"fromEndpoints": [{"matchLabels": None}]}]}, ".matchLabels", "everything"),
    "source of a selector": (
        {"ingress": [{"fromEndpoints": [{"matchLabels": {"contianer:app": "api"}}]}]},
        "matchLabels.contianer:app",
        "did you mean container:app?",
    ),
    "source of a subject": (
        {"endpointSelector": {"matchLabels": {"docker:app": "web"}}, "ingress": [{}]},
        "endpointSelector.matchLabels.docker:app",
        "known are any, container, k8s",
    ),
    "source in an expression": (
        {"egress": [{"toRequires": [{"matchExpressions": [{"key": "K8S:env", "operator": "Exists"}]}]}]},
        "matchExpressions[0].key",
        "did you mean k8s:env?",
    ),
    "IPv4 inside IPv6": (
        {"ingress": [{"fromCIDR": ["10.0.0.0/8", "::ffff:10.0.0.0/104"]}]},
        "fromCIDR[1]",
        "IPv4 is written as IPv4, 10.0.0.0/8",
    ),
    "IPv4 inside IPv6, in a set": (
        {"egress": [{"toCIDRSet": [{"cidr": "::ffff:192.0.2.1"}]}]},
        "toCIDRSet[0].cidr",
        "192.0.2.1/32",
    ),
}


@pytest.mark.parametrize("what", DOUBTFUL)
def test_doubtful(what: str) -> None:
    rule, path, words = DOUBTFUL[what]
    (warning,) = warned(**rule)
    assert path in warning
    assert words in warning


CLEAR: dict[str, dict[str, Any]] = {
    "no peers": {"ingress": [ON_80]},
    "nobody": {"ingress": [{"fromEndpoints": [], **ON_80}]},
    "null beside other peers": {"ingress": [{"fromEndpoints": None, "fromCIDR": ["10.0.0.0/8"], **ON_80}]},
    "null alone": {"ingress": [{"fromEndpoints": None}]},
    "null ports": {"ingress": [{"fromEndpoints": [WEB], "toPorts": None}]},
    "everybody": {"ingress": [{"fromEndpoints": [{}]}]},
    "null expressions": {"ingress": [{"fromEndpoints": [{**WEB, "matchExpressions": None}]}]},
    "known sources": {
        "ingress": [
            {"fromEndpoints": [{"matchLabels": {f"{source}:app": "api"}}]}
            for source in ("any", "container", "k8s", "unspec", "")
        ]
    },
    "reserved": {"ingress": [{"fromEndpoints": [{"matchLabels": {"reserved:host": ""}}]}]},
    "prefixes": {"egress": [{"toCIDR": ["::/0", "fd00::/8", "::1", "0.0.0.0/0"]}]},
}


@pytest.mark.parametrize("what", CLEAR)
def test_clear(what: str) -> None:
    assert warned(**CLEAR[what]) == []


def test_a_warning_names_file_and_line_in_every_form_of_document() -> None:
    rule = {"endpointSelector": {"matchLabels": {"contianer:app": "web"}}, "ingress": [{}]}
    manifest = {
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p", "labels": {"x:y": None}},
        "spec": rule,
    }
    for document in (rule, [rule], manifest, {"kind": "List", "items": [manifest]}):
        text = yaml.safe_dump(document, sort_keys=False)
        line = text[: text.index("contianer")].count("\n") + 1
        (warning,) = find_warnings(text, "web.yaml")
        assert str(warning).startswith(f"web.yaml, line {line}: ")


@pytest.mark.parametrize("example", examples(), ids=lambda each: each.text.splitlines()[3].strip())
def test_the_examples_of_the_documentation_are_clear(example: Any) -> None:
    assert find_warnings(example.text, "docs/policy.md") == []
