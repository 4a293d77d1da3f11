# SPDX-License-Identifier: Apache-2.0
"""The policy language: from text to policies.

Understood are CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy documents (``spec`` and
``specs``), lists of them as kubectl prints them, bare arrays of rules as `cilium policy import` took
them, and a single bare rule.  Everything is checked before anything is returned: a policy with a field
that is unknown or not enforced is refused as a whole, with the full path of that field.

Called by the agent's sources (directory, etcd, API), by `policy validate` and by the benches; pure.
A text of several megabytes takes seconds: run it in a thread where that matters.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from core.errors import shorten
from policy.document import read_documents
from policy.errors import DocumentError, PolicyNameError
from policy.model import Policy
from policy.prefixes import Prefixes
from policy.reader import Place
from policy.rules import read_rule

API_GROUP: Final = "cilium.io/"
NAMESPACED: Final = "CiliumNetworkPolicy"
CLUSTERWIDE: Final = "CiliumClusterwideNetworkPolicy"
LISTS: Final = ("List", f"{NAMESPACED}List", f"{CLUSTERWIDE}List")
MAX_NAME: Final = 253
# Bytes of one policy as it is stored.  etcd refuses requests above 1.5 MiB (--max-request-bytes), and the key
# and its message are in one too; `kvstore.schema` has the same limit.
MAX_STORED: Final = 1_500_000

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
_NOT_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_EXTENSION = re.compile(r"\.(ya?ml|json)\Z", re.IGNORECASE)
_compact = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def parse_policies(text: str, origin: str, *, name: str = "") -> list[Policy]:
    """Return the policies of `text`, at least one.

    `origin` names the text in messages: a file, an etcd key, ``standard input``.  `name` is the name of
    a bare rule or array; without it, the last part of `origin` less its extension.

    Raises DocumentError, PolicyNameError, FieldError, UnknownField, UnsupportedField.
    """
    policies: list[Policy] = []
    prefixes = Prefixes()
    for node in read_documents(text, origin):
        policies += _document(Place(node, "", origin), name, prefixes)
    if not policies:
        raise DocumentError(origin, 0, "it holds no policy")
    _check_names(policies, origin)
    return policies


def stored_text(document: Any) -> str:
    """Return `Policy.document` as it is stored in etcd and in the policy directory: JSON without blanks."""
    return _compact(document)


def check_name(name: str, origin: str) -> str:
    """Return `name` (``name`` or ``namespace/name``); PolicyNameError if it can not be one."""
    parts = name.split("/")
    if len(parts) > 2 or any(len(part) > MAX_NAME or not _NAME.match(part) for part in parts):
        raise PolicyNameError(
            f"{origin}: {shorten(name)!r} can not be a policy's name",
            hint=f"letters, digits, '.', '_' and '-', at most {MAX_NAME} characters, not at the ends",
        )
    return name


def _document(place: Place, name: str, prefixes: Prefixes) -> list[Policy]:
    value = place.node.value
    if isinstance(value, list):
        return [_bare(place, place.items(), name, prefixes)]
    if not isinstance(value, dict):
        raise place.error("it is no policy", hint=f"write a {NAMESPACED} or an array of rules")
    if "kind" in value or "apiVersion" in value or "metadata" in value or "spec" in value:
        return _manifest(place, prefixes)
    return [_bare(place, [place], name, prefixes)]


def _bare(place: Place, rules: list[Place], name: str, prefixes: Prefixes) -> Policy:
    if not rules:
        raise place.error("the array holds no rule")
    chosen = check_name(name or _name_from(place.origin), place.origin)
    return _policy(place, chosen, rules, prefixes)


def _policy(place: Place, name: str, rules: list[Place], prefixes: Prefixes) -> Policy:
    found = Policy(name, place.origin, tuple(read_rule(each, prefixes) for each in rules), place.node.plain())
    _check_storable(place, found)
    return found


def _check_storable(place: Place, policy: Policy) -> None:
    """Raise DocumentError for what could not be written to etcd, wherever the text is from."""
    try:
        size = len(stored_text(policy.document).encode())
    except ValueError as error:  # half of a surrogate pair, an endless number
        problem = f"policy {policy.name} holds what can not be stored: {shorten(str(error))}"
        raise DocumentError(place.origin, place.node.line, problem) from error
    if size > MAX_STORED:
        raise DocumentError(
            place.origin,
            place.node.line,
            f"policy {policy.name} takes {size} bytes as it is stored, more than the {MAX_STORED} that fit",
            hint="split its rules into several policies, each with its own name: rules add up",
        )


def _name_from(origin: str) -> str:
    last = _EXTENSION.sub("", origin.replace("\\", "/").rstrip("/").rpartition("/")[2])
    found = _NOT_NAME.sub("-", last).strip("-._")
    if not found:
        raise PolicyNameError(f"{origin}: a bare rule has no name of its own", hint="give it one with --name")
    return found


def _manifest(place: Place, prefixes: Prefixes) -> list[Policy]:
    members = place.members()
    kind = members.get("kind")
    if kind is None or kind.absent:
        raise place.error("kind is missing", hint=f"kind: {NAMESPACED}")
    if kind.node.value in LISTS:
        return _list(place, members, prefixes)
    _check_kind(members)
    given = place.fields("document")
    name = _manifest_name(place, given)
    return [_policy(place, name, _rules(place, given), prefixes)]


def _list(place: Place, members: dict[str, Place], prefixes: Prefixes) -> list[Policy]:
    for key, each in members.items():
        if key not in ("apiVersion", "kind", "metadata", "items"):
            raise each.error("a List has no such field", hint="known: apiVersion, kind, metadata, items")
    if "items" not in members or members["items"].absent:
        raise place.error("items is missing")
    policies: list[Policy] = []
    for item in members["items"].items():
        kind = item.members().get("kind")
        if kind is not None and kind.node.value in LISTS:
            raise item.error("a List inside a List")
        policies += _manifest(item, prefixes)
    return policies


def _check_kind(members: dict[str, Place]) -> None:
    kind = members["kind"]
    if kind.node.value == "NetworkPolicy":
        raise kind.unsupported("NetworkPolicy of Kubernetes is not supported", hint=f"write a {NAMESPACED}")
    kind.choice((NAMESPACED, CLUSTERWIDE), "kind of policy")
    version = members.get("apiVersion")
    if version is not None and not version.absent and not version.text().startswith(API_GROUP):
        raise version.error(f"{shorten(version.text())} is not known", hint="apiVersion: cilium.io/v2")


def _manifest_name(place: Place, given: dict[str, Place]) -> str:
    metadata = given["metadata"].fields("metadata") if "metadata" in given else {}
    if "name" not in metadata:
        raise place.error("metadata.name is missing")
    name = metadata["name"].text()
    if "namespace" in metadata and given["kind"].text() == NAMESPACED:
        namespace = metadata["namespace"].text()
        name = f"{namespace}/{name}" if namespace else name
    return check_name(name, place.origin)


def _rules(place: Place, given: dict[str, Place]) -> list[Place]:
    rules = [given["spec"]] if "spec" in given else []
    rules += given["specs"].items() if "specs" in given else []
    if not rules:
        raise place.error("spec is missing, and specs holds no rule")
    return rules


def _check_names(policies: list[Policy], origin: str) -> None:
    seen: set[str] = set()
    for policy in policies:
        if policy.name in seen:
            raise PolicyNameError(
                f"{origin}: two policies are called {policy.name}", hint="give each its own name"
            )
        seen.add(policy.name)
