# SPDX-License-Identifier: Apache-2.0
"""A folder for each machine of an inventory, complete: what `make member` and `make join` are given.

    DIR/ca/                ca.crt  ca.key                                            stays here
    DIR/members/NAME/      ca.crt  etcd.crt      etcd.key      etcd.config  member.env
    DIR/hosts/NAME/        ca.crt  agent.crt     agent.key     etcd.config
    DIR/operators/NAME/    ca.crt  operator.crt  operator.key  etcd.config

By the same plan as a single certificate (`certs.plan`): what is there and good stays, and if one is refused,
nothing is written.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence, Set
from pathlib import Path, PurePosixPath

from certs import etcd_config
from certs.apply import apply, survey_folders
from certs.errors import BadRequest
from certs.inspect import summarize
from certs.inventory import Inventory, member_settings
from certs.issue import Request, utc_now
from certs.layout import CERTIFICATE_MODE, Folder, Holder, Layout
from certs.material import load_certificate, write_file
from certs.plan import Action, Step, plan

FOLDERS = {Holder.ETCD: "members", Holder.AGENT: "hosts", Holder.OPERATOR: "operators"}
SEEN_AT = {
    Holder.ETCD: PurePosixPath("/etc/etcd/certs"),
    Holder.AGENT: PurePosixPath("/etc/holdfast/certs"),
    Holder.OPERATOR: PurePosixPath("/etc/holdfast/operator"),
}
SETTINGS_FILE = "member.env"


def requests(inventory: Inventory) -> list[Request]:
    """Return who wants a certificate."""
    return [
        *(Request(Holder.ETCD, name, addresses) for name, addresses in inventory.members.items()),
        *(Request(Holder.AGENT, name) for name in inventory.hosts),
        *(Request(Holder.OPERATOR, name) for name in inventory.operators),
    ]


def folder_of(root: Path, request: Request) -> Folder:
    return Folder(request.holder, root / FOLDERS[request.holder] / request.name)


def fleet_folders(root: Path) -> list[Folder]:
    """Return the folders of machines and people that are there."""
    places = [(holder, root / name) for holder, name in FOLDERS.items()]
    return [
        Folder(holder, path) for holder, place in places if place.is_dir() for path in sorted(place.iterdir())
    ]


def plan_fleet(inventory: Inventory, root: Path, renew: Set[str] = frozenset()) -> list[Step]:
    """Return the steps, the CA's first; those whose name is in `renew` get a new key.

    Raises BadRequest for a name to renew that the inventory has not.
    """
    wanted = requests(inventory)
    strangers = renew - {each.name for each in wanted}
    if strangers:
        raise BadRequest(f"{min(strangers)} is to be renewed, and is not in the inventory")
    folders = [(each, folder_of(root, each)) for each in wanted]
    authority, found = survey_folders(Layout(root).folder(Holder.AUTHORITY), folders, utc_now())
    kept = plan(authority, [pair for pair in found if pair[0].name not in renew])
    renewed = plan(authority, [pair for pair in found if pair[0].name in renew], set(FOLDERS))
    first = renewed[0] if renewed[0].action is Action.REFUSE else kept[0]
    return [first, *kept[1:], *renewed[1:]]


def write_fleet(
    inventory: Inventory, steps: Sequence[Step], validity: datetime.timedelta, authority: datetime.timedelta
) -> list[Path]:
    """Carry out a plan, write what goes with each certificate, and return the files written."""
    written = apply(steps, validity=validity, authority_validity=authority)
    # One for each CA, so that members of two clusters never take each other for their own.
    token = f"holdfast-{summarize(load_certificate(steps[0].folder.certificate)).serial[:16]}"
    for step in steps[1:]:
        folder = step.folder
        written += etcd_config.write(folder, inventory.endpoints, SEEN_AT[folder.holder], overwrite=True)
        if folder.holder is Holder.ETCD and step.request is not None:
            text = member_settings(inventory, step.request.name, token).encode()
            written += _write_if_new(folder.path / SETTINGS_FILE, text)
    return written


def _write_if_new(path: Path, text: bytes) -> list[Path]:
    if path.exists() and path.read_bytes() == text:
        return []
    write_file(path, text, CERTIFICATE_MODE)
    return [path]
