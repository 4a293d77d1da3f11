# SPDX-License-Identifier: Apache-2.0
"""What the policy language refuses: each refusal names the field, the line and what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policy.document import MAX_CHARACTERS, MAX_VALUES
from policy.errors import (
    DocumentError,
    FieldError,
    PolicyError,
    PolicyNameError,
    UnknownField,
    UnsupportedField,
)
from policy.fields import SECTIONS, Status
from policy.language import parse_policies


def refused(text: str) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        parse_policies(text, "p.yaml", name="p")
    return caught.value


def refused_rule(**fields: Any) -> PolicyError:
    return refused(json.dumps({"endpointSelector": {}, **fields}))


def manifest(**fields: Any) -> str:
    spec: dict[str, Any] = {"endpointSelector": {}, "ingress": [{}]}
    whole = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p"}}
    return json.dumps(
        {key: each for key, each in {**whole, "spec": spec, **fields}.items() if each is not None}
    )


def test_message_has_origin_line_path_reason_and_hint() -> None:
    text = (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\n"
        "spec:\n  endpointSelector: {}\n  ingress:\n  - toPorts:\n"
        "    - ports: [{port: '80'}]\n    - ports: [{port: '81'}]\n      rules: {http: [{}]}\n"
    )
    error = refused(text)
    assert isinstance(error, UnsupportedField)
    assert error.path == "spec.ingress[0].toPorts[1].rules"
    assert str(error) == (
        "p.yaml, line 10: spec.ingress[0].toPorts[1].rules: this field is not supported "
        "(layer 7 is not enforced; allow the port, or keep the rule out)"
    )


def test_unknown_field_suggests_the_near_one() -> None:
    error = refused("- endpointSelector: {}\n  ingress:\n  - fromEndpoint: [{}]\n")
    assert isinstance(error, UnknownField)
    assert str(error) == (
        "p.yaml, line 3: [0].ingress[0].fromEndpoint: no such field (did you mean fromEndpoints?)"
    )


REFUSED = [
    (section, field.name)
    for section, fields in SECTIONS.items()
    for field in fields
    if field.status is Status.REFUSED
]


@pytest.mark.parametrize(("section", "name"), REFUSED)
def test_every_refused_field_is_refused_by_name(section: str, name: str) -> None:
    element: dict[str, Any] = {name: [{"x": 1}]}
    places: dict[str, dict[str, Any]] = {
        "rule": {"ingress": [{}], name: {}},
        "CIDRSet": {"ingress": [{"fromCIDRSet": [element]}]},
        "toPorts": {"ingress": [{"toPorts": [{"ports": [{"port": "80"}], **element}]}]},
    }
    error = refused_rule(**places.get(section, {section: [element]}))
    assert isinstance(error, UnsupportedField)
    assert error.path.endswith(name)
    assert error.hint


RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"ingress": [{"toPorts": [{"ports": [{"port": "ht_tp"}]}]}]}, "ports[0].port", "can not be the name"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "a" * 16}]}]}]}, "ports[0].port", "can not be the name"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "a--b"}]}]}]}, "ports[0].port", "can not be the name"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "\u00e4"}]}]}]}, "ports[0].port", "can not be the name"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": ""}]}]}]}, "ports[0].port", "where port"),
    (
        {"ingress": [{"toPorts": [{"ports": [{"port": "http", "endPort": 90}]}]}]},
        "ports[0].endPort",
        "a range can not begin at the name 'http'",
    ),
    ({"nodeSelector": {"matchLabels": {"a": 1}}, "ingress": [{}]}, "matchLabels.a", "put it in quotes"),
    ({"nodeSelector": {"matchLabel": {}}, "ingress": [{}]}, "matchLabel", "did you mean matchLabels?"),
    ({"ingress": [{"fromRequires": {"a": "b"}}]}, "ingress[0].fromRequires", "a mapping where a list"),
    ({"ingress": [{"fromRequires": [{}]}]}, "fromRequires[0]", "it requires nothing"),
    ({"ingress": [{"toRequires": [{}]}]}, "ingress[0].toRequires", "did you mean fromRequires?"),
    (
        {"ingress": [{"fromRequires": [{"matchLabels": {"a": "b"}}], "toPorts": [{"ports": [{"port": 1}]}]}]},
        "ingress[0].fromRequires",
        "it narrows fromEndpoints only",
    ),
    (
        {"egressDeny": [{"toRequires": [{"matchLabels": {"a": "b"}}], "toEntities": ["world"]}]},
        "egressDeny[0].toRequires",
        "it narrows toEndpoints only",
    ),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "0"}]}]}]}, "ports[0].port", "port 0"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "65536"}]}]}]}, "ports[0].port", "65536 is no port"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "-1"}]}]}]}, "ports[0].port", "-1"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "010"}]}]}]}, "ports[0].port", "010"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": True}]}]}]}, "ports[0].port", "True"),
    ({"ingress": [{"toPorts": [{"ports": [{"port": 80.5}]}]}]}, "ports[0].port", "80.5"),
    ({"ingress": [{"toPorts": [{"ports": [{}]}]}]}, "ports[0]", "port is missing"),
    ({"ingress": [{"toPorts": [{"ports": []}]}]}, "toPorts[0]", "names no ports"),
    ({"ingress": [{"toPorts": {"ports": []}}]}, "ingress[0].toPorts", "a mapping where a list"),
    (
        {"ingress": [{"toPorts": [{"ports": [{"port": "80", "protocol": "TPC"}]}]}]},
        "ports[0].protocol",
        "did you mean TCP?",
    ),
    (
        {"ingress": [{"toPorts": [{"ports": [{"port": "8", "protocol": "ICMP"}]}]}]},
        "ports[0].protocol",
        "use icmps",
    ),
    (
        {"ingress": [{"toPorts": [{"ports": [{"port": "1", "endPort": 65}]}]}]},
        "ports[0].endPort",
        "a range of 65 ports is not supported, the most is 64",
    ),
    ({"ingress": [{"toPorts": [{"ports": [{"port": "9", "endPort": 8}]}]}]}, "endPort", "8 is no end"),
    ({"ingress": [{"icmps": [{"fields": [{"type": 256}]}]}]}, "fields[0].type", "256 is no ICMP type"),
    ({"ingress": [{"icmps": [{"fields": [{"family": "IPv5", "type": 1}]}]}]}, "family", "IPv5"),
    ({"ingress": [{"icmps": [{}]}]}, "icmps[0]", "names no types"),
    (
        {"ingress": [{"icmps": [{"fields": [{"type": 8}]}], "toPorts": [{"ports": [{"port": 1}]}]}]},
        "ingress[0].icmps",
        "icmps and toPorts in one element",
    ),
    ({"egress": [{"toCIDR": ["10.0.0.0/33"]}]}, "egress[0].toCIDR[0]", "10.0.0.0/33"),
    ({"egress": [{"toCIDR": ["10.0.0.0/255.0.0.0"]}]}, "toCIDR[0]", "255.0.0.0"),
    ({"egress": [{"toCIDR": ["fe80::1%eth0"]}]}, "toCIDR[0]", "fe80::1%eth0"),
    ({"egress": [{"toCIDR": [10]}]}, "toCIDR[0]", "10 where text is expected"),
    (
        {"egress": [{"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}]}]},
        "toCIDRSet[0].except[0]",
        "11.0.0.0/16 is not inside 10.0.0.0/8",
    ),
    ({"egress": [{"toCIDRSet": [{}]}]}, "toCIDRSet[0]", "cidr is missing"),
    (
        {"egress": [{"toEndpoints": [{}], "toEntities": ["world"]}]},
        "egress[0].toEntities",
        "toEndpoints and toEntities in one element",
    ),
    ({"egress": [{"toEntities": ["wrold"]}]}, "toEntities[0]", "did you mean world?"),
    ({"egress": [{"toEntities": ["kube-apiserver"]}]}, "toEntities[0]", "no Kubernetes API server"),
    ({"ingress": [{"fromEndpoints": [{"matchLabels": {"a": 1}}]}]}, "matchLabels.a", "put it in quotes"),
    ({"ingress": [{"fromEndpoints": [{"matchLabels": {"a": "x;y"}}]}]}, "matchLabels.a", "';'"),
    ({"ingress": [{"fromEndpoints": [{"matchLabels": {"a": "x\n"}}]}]}, "matchLabels.a", "printed"),
    ({"ingress": [{"fromEndpoints": [{"matchLabels": {"reserved:hots": ""}}]}]}, "hots", "no reserved label"),
    (
        {"ingress": [{"fromEndpoints": [{"matchLabels": {"cidr:10.0.0.0/8": ""}}]}]},
        "cidr",
        "use a CIDR field",
    ),
    (
        {"ingress": [{"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "in"}]}]}]},
        "matchExpressions[0].operator",
        "did you mean In?",
    ),
    (
        {"ingress": [{"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "In"}]}]}]},
        "matchExpressions[0]",
        "In needs values",
    ),
    (
        {
            "ingress": [
                {
                    "fromEndpoints": [
                        {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}
                    ]
                }
            ]
        },
        "matchExpressions[0].values",
        "Exists takes no values",
    ),
    ({"ingress": [{"fromEndpoints": {}}]}, "ingress[0].fromEndpoints", "a mapping where a list"),
    ({"ingress": ["all"]}, "ingress[0]", "where a mapping is expected"),
    ({"ingressDeny": [{}]}, "ingressDeny[0]", "would deny nothing"),
    ({}, "", "the rule would do nothing"),
    ({"ingress": []}, "", "the rule would do nothing"),
    ({"endpointSelector": None, "ingress": [{}]}, "", "endpointSelector is missing"),
    ({"ingress": [{}], "enableDefaultDeny": {"ingress": "no"}}, "enableDefaultDeny.ingress", "true or false"),
    ({"ingress": [{}], "description": 7}, "description", "where text is expected"),
    ({"ingress": [{}], "labels": [{"value": "x"}]}, "labels[0]", "key is missing"),
]


@pytest.mark.parametrize(("fields", "path", "problem"), RULES)
def test_bad_rules(fields: dict[str, Any], path: str, problem: str) -> None:
    error = refused_rule(**fields)
    assert isinstance(error, FieldError)
    assert error.path.endswith(path) or path in error.path
    assert problem in str(error)


DOCUMENTS = [
    (manifest(kind=None), "kind is missing"),
    (manifest(kind="NetworkPolicy"), "NetworkPolicy of Kubernetes is not supported"),
    (manifest(kind="CiliumNetworkPolcy"), "did you mean CiliumNetworkPolicy?"),
    (manifest(apiVersion="v1"), "apiVersion: v1 is not known"),
    (manifest(metadata=None), "metadata.name is missing"),
    (manifest(metadata={"name": "p", "namspace": "x"}), "did you mean namespace?"),
    (manifest(spec=None), "spec is missing"),
    (manifest(spec=None, specs=[]), "spec is missing"),
    (manifest(sepc={}), "did you mean spec"),
    ("[]", "the array holds no rule"),
    ("", "it holds no policy"),
    ("---\n---\n", "it holds no policy"),
    ("just text", "it is no policy"),
    ("7", "it is no policy"),
    ('{"kind": "List"}', "items is missing"),
    ('{"kind": "List", "items": [{"kind": "List", "items": []}]}', "a List inside a List"),
    ("a: 1\na: 2\n", "line 2: key a is given twice"),
    ('{"a": 1, "a": 2}', "key a is given twice"),
    ("a: &x [1]\nb: *x\n", "line 1: anchor &x is not allowed"),
    ("a: *x\n", "alias *x is not allowed"),
    ("a: !!python/object/apply:os.system [id]\n", "tag tag:yaml.org,2002:python/object/apply:os.system"),
    ("a: !!int '7'\n", "tag tag:yaml.org,2002:int is not allowed"),
    ("? [a]\n: 1\n", "a key must be text"),
    ("a: [1\n", "no valid YAML"),
    ("a:\n\tb: 1\n", "line 2: no valid YAML"),
    ("a: \x00", "no valid YAML"),
    ("a: \ud800", "no valid Unicode"),
    (
        manifest(metadata={"name": "p", "annotations": {"a": "\ud800"}}),
        "policy p holds what can not be stored",
    ),
    (manifest(metadata={"name": "p", "annotations": {"\udc00": 1}}), "policy p holds what can not be stored"),
    (manifest(spec={"endpointSelector": {}, "ingress": [{}], "description": "\ud800"}), "can not be stored"),
    (
        manifest(metadata={"name": "p", "annotations": {"a": 1}}).replace(" 1}", " 1e999}"),
        "can not be stored",
    ),
    ("[" * 100_000, "nested more than 32 deep"),
    ("- " * 5_000, "nested more than 32 deep"),
    ('{"a":' * 100_000, "nested more than 32 deep"),
    (json.dumps([[[[[]]]]]).replace("[]", "[" * 40 + "]" * 40), "nested more than 32 deep"),
    (f"[{'1,' * MAX_VALUES}1]", f"more than {MAX_VALUES} values"),
    ("x" * (MAX_CHARACTERS + 1), "characters are more than"),
]


@pytest.mark.parametrize(("text", "problem"), DOCUMENTS, ids=[problem for _, problem in DOCUMENTS])
def test_bad_documents(text: str, problem: str) -> None:
    assert problem in str(refused(text))


def test_many_aliases_do_not_expand() -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10))
    assert isinstance(refused(f"l0: &l0 [x]\n{levels}\n"), DocumentError)


@pytest.mark.parametrize("name", ["", "a/b/c", "/a", "a/", "../x", "-a", "a b", "a\n", "x" * 254, "é"])
def test_bad_names(name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policies(manifest(metadata={"name": name}), "t")
    assert isinstance(caught.value, PolicyNameError)


def test_one_name_twice_in_one_text() -> None:
    with pytest.raises(PolicyNameError, match="two policies are called p"):
        parse_policies(f"{manifest()}\n".replace("{", "---\n{", 1) * 2, "t")


def test_one_bad_rule_refuses_the_whole_text() -> None:
    good: dict[str, Any] = {"endpointSelector": {}, "ingress": [{}]}
    with pytest.raises(UnsupportedField, match=r"\[1\]\.nodeSelector"):
        parse_policies(json.dumps([good, {"nodeSelector": {}, "ingress": [{}]}]), "t", name="p")


names = st.sampled_from(
    sorted(
        {field.name for fields in SECTIONS.values() for field in fields}
        | {"kind", "items", "app", "container:app", "reserved:host", "x"}
    )
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["In", "Exists", "80", "TCP", "10.0.0.0/8", "::/0", "all", "CiliumNetworkPolicy", "List"]
    ),
)
documents = st.recursive(
    scalars,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(st.one_of(names, st.text(max_size=4)), children, max_size=5),
    ),
    max_leaves=40,
)


@settings(max_examples=400, deadline=None)
@given(documents)
@example({"kind": {"a": 1}})
@example({"kind": "List", "items": [7]})
@example([{"endpointSelector": {}, "ingress": [{"fromCIDR": ["::/0"]}]}])
def test_any_document_gives_policies_or_a_policy_error(document: Any) -> None:
    parses_or_refuses(json.dumps(document))


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), st.text(alphabet="{}[]:,-?&*!|>'\"#%@ \n\tax1.", max_size=120)))
@example("? a\n: - b\n  - {c: d}\n")
@example("{a: 1")
@example("\ufeff- a")
@example("%YAML 9.9\n---\na")
@example("--- |\n a\n...\n--- >\n b")
def test_any_text_gives_policies_or_a_policy_error(text: str) -> None:
    parses_or_refuses(text)


def parses_or_refuses(text: str) -> None:
    message = "fuzz"
    try:
        policies = parse_policies(text, "fuzz", name="fuzz")
    except PolicyError as error:
        message = str(error)
    else:
        assert all(policy.rules for policy in policies)
    assert message.startswith("fuzz")
    assert len(message) < 2_000
