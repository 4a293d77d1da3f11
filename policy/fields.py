# SPDX-License-Identifier: Apache-2.0
"""The fields of the policy language, as one table: what is enforced, what is refused and why.

`policy.language` accepts exactly what stands here, and the table in docs/policy.md is
`markdown_table()`: a field can not be accepted without being documented, nor the other way round.
Called by `policy.reader` and by the documentation test; pure.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import Final, NamedTuple


class Status(Enum):
    """What happens to a field that is given."""

    ENFORCED = "enforced"
    KEPT = "kept"  # shown again, without effect on packets
    IGNORED = "ignored"  # written by Kubernetes, means nothing here
    REFUSED = "refused"  # an error: ignoring it would change what the policy means


class Field(NamedTuple):
    """One field: its name, what happens to it, and its form or (if refused) what to do instead."""

    name: str
    status: Status
    note: str


E, K, I, R = Status.ENFORCED, Status.KEPT, Status.IGNORED, Status.REFUSED  # noqa: E741

_SELECTOR_NOTE = "a selector: `matchLabels`, `matchExpressions`; `{}` selects everything"
_PORTS = Field("toPorts", E, "list of `ports`; without a peer field it is for everybody")
_ICMPS = Field("icmps", E, "list of `fields`; not together with `toPorts`")
_L7 = "layer 7 is not enforced; allow the port, or keep the rule out"
_AUTH = Field("authentication", R, "mutual authentication does not exist here; remove it")


def _peers(verb: str) -> tuple[Field, ...]:
    return (
        Field(f"{verb}Endpoints", E, "list of selectors; `[]` selects nobody, `[{}]` everybody"),
        Field(f"{verb}CIDR", E, "list of prefixes or addresses; not for endpoints, VMs and hosts inside"),
        Field(f"{verb}CIDRSet", E, "list of `cidr` with `except`"),
        Field(
            f"{verb}Entities",
            E,
            "list of all, world, cluster, host, remote-node, init, unmanaged, health, none",
        ),
        Field(
            f"{verb}Requires",
            E,
            f"list of selectors: what every peer under `{verb}Endpoints` of every rule must have too",
        ),
        Field(f"{verb}Groups", R, "list the addresses in a CIDR field"),
        Field(f"{verb}Nodes", R, "use the entities host and remote-node"),
    )


_EGRESS_ONLY = (
    Field("toFQDNs", R, "names are not resolved; list the addresses in toCIDR"),
    Field("toServices", R, "there are no Kubernetes services; use toEndpoints or toCIDR"),
)

SECTIONS: Final[dict[str, tuple[Field, ...]]] = {
    "document": (
        Field("apiVersion", K, "`cilium.io/v2`"),
        Field("kind", K, "CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, or a List of them"),
        Field("metadata", K, "`name`, `namespace`"),
        Field("spec", E, "one rule"),
        Field("specs", E, "list of rules"),
        Field("status", I, "Kubernetes' own"),
    ),
    "metadata": (
        Field("name", K, "the policy's name"),
        Field("namespace", K, "goes into the name (`namespace/name`); it does *not* narrow selectors"),
        *(
            Field(name, I, "Kubernetes' own")
            for name in (
                "annotations",
                "creationTimestamp",
                "deletionGracePeriodSeconds",
                "deletionTimestamp",
                "finalizers",
                "generateName",
                "generation",
                "labels",
                "managedFields",
                "ownerReferences",
                "resourceVersion",
                "selfLink",
                "uid",
            )
        ),
    ),
    "rule": (
        Field("endpointSelector", E, f"the endpoints it is for; {_SELECTOR_NOTE}"),
        Field("nodeSelector", R, "it is checked; there is no host firewall yet; use endpointSelector"),
        Field("ingress", E, "list; the selected endpoints become default-deny for ingress"),
        Field("ingressDeny", E, "list; wins over every allow"),
        Field("egress", E, "list; the selected endpoints become default-deny for egress"),
        Field("egressDeny", E, "list; wins over every allow"),
        Field("enableDefaultDeny", E, "`ingress`, `egress`: false adds rules without default-deny"),
        Field("labels", K, "list of `source:key=value` or of `key`, `value`, `source`"),
        Field("description", K, "text"),
        Field("log", R, "remove it; drops and verdicts are in `holdfast monitor`"),
    ),
    "enableDefaultDeny": (Field("ingress", E, "true or false"), Field("egress", E, "true or false")),
    "ruleLabel": (Field("key", K, "text"), Field("value", K, "text"), Field("source", K, "text")),
    "selector": (
        Field("matchLabels", E, "`key: value` or `source:key: value`"),
        Field("matchExpressions", E, "list of `key`, `operator`, `values`"),
    ),
    "matchExpressions": (
        Field("key", E, "`key` or `source:key`"),
        Field("operator", E, "In, NotIn, Exists, DoesNotExist"),
        Field("values", E, "list of text, for In and NotIn"),
    ),
    "ingress": (*_peers("from"), _PORTS, _ICMPS, _AUTH),
    "ingressDeny": (*_peers("from"), _PORTS, _ICMPS),
    "egress": (*_peers("to"), *_EGRESS_ONLY, _PORTS, _ICMPS, _AUTH),
    "egressDeny": (*_peers("to"), *_EGRESS_ONLY, _PORTS, _ICMPS),
    "CIDRSet": (
        Field("cidr", E, "a prefix"),
        Field("except", E, "list of prefixes inside it"),
        Field("cidrGroupRef", R, "list the prefixes"),
        Field("cidrGroupSelector", R, "list the prefixes"),
    ),
    "toPorts": (
        Field("ports", E, "list of `port`, `protocol`, `endPort`"),
        Field("rules", R, _L7),
        Field("terminatingTLS", R, _L7),
        Field("originatingTLS", R, _L7),
        Field("serverNames", R, _L7),
        Field("listener", R, _L7),
    ),
    "ports": (
        Field("port", E, "1 to 65535, or the name of a port (label `holdfast.port.NAME`)"),
        Field("protocol", E, "TCP, UDP, SCTP or ANY (the default: all three)"),
        Field("endPort", E, "end of a range of at most 64 ports"),
    ),
    "icmps": (Field("fields", E, "list of `family`, `type`"),),
    "fields": (
        Field("family", E, "IPv4 (the default) or IPv6"),
        Field("type", E, "0 to 255"),
    ),
}


def markdown_table() -> str:
    """Return the table of docs/policy.md: one line a field, in the order of `SECTIONS`."""
    lines = ["| in | field | | note |", "|---|---|---|---|"]
    for section, fields in SECTIONS.items():
        lines += [f"| {section} | `{each.name}` | {each.status.value} | {each.note} |" for each in fields]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown_table())
