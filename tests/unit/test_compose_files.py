# SPDX-License-Identifier: Apache-2.0
"""What the compose files and the image promise, read from the files themselves: rights, keys, duplicates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from certs.inventory import SETTINGS, Inventory, member_settings
from certs.issue import PEER_NAME
from core.options import parse_duration
from kvstore.upkeep import DEFAULT_QUOTA
from prestart.window import window_length
from tests.support.host import REPO

COMPOSE = REPO / "compose"
FILES = sorted([*COMPOSE.glob("*/docker-compose.yml"), *REPO.glob("tests/engine/data/*/docker-compose.yml")])
ROLES = [COMPOSE / role / "docker-compose.yml" for role in ("all-in-one", "host")]
KVSTORE = COMPOSE / "kvstore" / "docker-compose.yml"
ETCD_ROLES = [COMPOSE / "all-in-one" / "docker-compose.yml", KVSTORE]
# Not in 1.29, or not in the 2.x that distributions ship.
TOO_NEW = {"name", "configs", "include", "version"}


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_only_keys_that_both_composes_know(path: Path) -> None:
    content = load(path)
    assert not TOO_NEW & content.keys()
    for service in content["services"].values():
        assert not {"post_start", "cgroup", "develop"} & service.keys()


@pytest.mark.parametrize("path", ROLES, ids=lambda path: path.parent.name)
def test_agent_has_four_capabilities_and_no_privileged(path: Path) -> None:
    agent = load(path)["services"]["agent"]
    assert agent["cap_drop"] == ["ALL"]
    assert agent["cap_add"] == ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "NET_BIND_SERVICE"]
    assert "privileged" not in agent


@pytest.mark.parametrize("path", ROLES, ids=lambda path: path.parent.name)
def test_agent_can_not_see_the_operators_key_nor_the_authoritys(path: Path) -> None:
    for volume in load(path)["services"]["agent"]["volumes"]:
        source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
        assert source not in ("/etc/holdfast", "/etc", "/")
        assert "operator" not in source
        assert "state" not in source


@pytest.mark.parametrize("path", ROLES, ids=lambda path: path.parent.name)
def test_agent_has_the_directory_of_the_engines_socket_and_no_socket(path: Path) -> None:
    """A socket that is mounted by itself is a dead one once the engine has started again."""
    volumes = load(path)["services"]["agent"]["volumes"]
    (directory,) = [each for each in volumes if isinstance(each, dict) and each["target"] == "/host/run"]
    assert directory["read_only"]
    assert directory["bind"] == {"propagation": "rslave"}
    assert not [each for each in volumes if isinstance(each, str) and ".sock:" in each]


def test_agent_is_the_same_service_in_both_roles() -> None:
    first, second = (load(path)["services"]["agent"] for path in ROLES)
    assert first.pop("environment").keys() == second.pop("environment").keys()
    assert first == second


@pytest.mark.parametrize("path", [*ROLES, KVSTORE], ids=lambda path: path.parent.name)
def test_every_service_restarts_and_bounds_its_log(path: Path) -> None:
    for service in load(path)["services"].values():
        assert service["restart"] == "always"
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}
        assert "healthcheck" in service


def options(path: Path) -> dict[str, str]:
    """Return etcd's options in a compose file."""
    pairs = (word.removeprefix("--").partition("=") for word in load(path)["services"]["etcd"]["command"])
    return {name: value for name, _, value in pairs}


def test_a_members_services_have_no_rights_at_all() -> None:
    for service in load(KVSTORE)["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"cap_add", "privileged", "devices", "pid"} & service.keys()


@pytest.mark.parametrize("path", ETCD_ROLES, ids=lambda path: path.parent.name)
def test_etcd_wants_certificates_of_clients_and_members_alone_as_peers(path: Path) -> None:
    found = options(path)
    for name in ("client-cert-auth", "peer-client-cert-auth"):
        assert found[name] in ("", "true")
    assert found["peer-cert-allowed-hostname"] == PEER_NAME
    for urls in ("listen-client-urls", "listen-peer-urls", "advertise-client-urls"):
        assert all(url.startswith("https://") for url in found[urls].split(","))


@pytest.mark.parametrize("path", ETCD_ROLES, ids=lambda path: path.parent.name)
def test_history_outlives_the_start_window_twice(path: Path) -> None:
    found = options(path)
    assert found["auto-compaction-mode"] == "periodic"
    assert parse_duration(found["auto-compaction-retention"]) >= 2 * window_length(10_000)


def test_a_members_metrics_are_for_its_own_machine() -> None:
    assert options(KVSTORE)["listen-metrics-urls"].startswith("http://127.0.0.1:")


def test_maintenance_knows_etcds_quota_and_its_default() -> None:
    (quota,) = (word for word in load(KVSTORE)["services"]["maintenance"]["command"] if "--quota=" in word)
    assert quota.removeprefix("--quota=") == options(KVSTORE)["quota-backend-bytes"]
    assert str(DEFAULT_QUOTA) in quota


def test_a_members_variables_are_those_that_certs_writes() -> None:
    used = set(re.findall(r"\$\{(HOLDFAST_\w+)", KVSTORE.read_text()))
    machines = Inventory({"a": ("10.0.0.1",)}, settings=dict.fromkeys(SETTINGS.values(), "x"))
    written = {line.partition("=")[0] for line in member_settings(machines, "a", "t").splitlines()[1:]}
    assert written <= used
    assert used - written == {"HOLDFAST_ETCD_IMAGE", "HOLDFAST_IMAGE", "HOLDFAST_CLUSTER_STATE"}


def test_dockerfile_suits_the_classic_builder() -> None:
    text = (COMPOSE / "Dockerfile").read_text()
    assert "# syntax" not in text
    assert not re.search(r"RUN\s+--mount|<<EOF|COPY\s+--(link|chmod)", text)


def test_every_package_of_the_project_goes_into_the_image() -> None:
    allowed = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {path.parent.name for path in REPO.glob("*/__init__.py")} - {"bench", "tests"}
    assert packages <= allowed


@pytest.mark.parametrize("path", sorted(COMPOSE.glob("setup/*.sh")), ids=lambda path: path.name)
def test_setup_names_no_host(path: Path) -> None:
    """Mirrors and indexes are the machine's own configuration."""
    assert not re.search(r"https?://(?!127\.0\.0\.1)", path.read_text())
