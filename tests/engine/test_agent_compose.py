# SPDX-License-Identifier: Apache-2.0
"""docker's own names and an application of ten services, on the network of Holdfast and split by policy."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.support.engine import COMPOSE_VERSIONS
from tests.support.host import wait_for
from tests.support.site import Site

TEN_SERVICES = Path(__file__).parent / "data" / "ten-services"
POLICY = TEN_SERVICES / "policy.yaml"
SERVICE = "com.docker.compose.service"
WEB_PORT = 8085

# who asks → whom: what policy.yaml allows, and some of what it does not
ALLOWED = {
    "web": ("api", "static"),
    "api": ("auth", "db", "cache", "queue", "search"),
    "auth": ("db", "cache"),
    "worker": ("queue", "db", "mailer"),
}
DENIED = {
    "web": ("db", "cache", "worker"),
    "static": ("api",),
    "db": ("api", "cache"),
    "mailer": ("worker", "db"),
    "worker": ("cache",),
}
PORTS = {
    **{"api": 8000, "static": 8081, "auth": 8001, "db": 5432, "cache": 6379},
    **{"queue": 5672, "search": 9200, "worker": 8002, "mailer": 8025},
}


def test_containers_find_each_other_by_name(site: Site) -> None:
    """docker's resolver is in the container's own namespace; names of networks are its own affair."""
    for name, place in (("server", site.server), ("other", site.other)):
        done = site.host.inside("client", "getent", "ahostsv4", name)
        assert done.stdout.split()[0] == place.address


def test_names_resolve_where_policy_lets_nothing_out(site: Site) -> None:
    """The resolver listens inside the container: no packet of it meets policy."""
    with site.policy({"endpointSelector": {"matchLabels": {"app": "client"}}, "egress": [{}]}):
        done = site.host.inside("client", "getent", "ahostsv4", "server")
        assert done.stdout.split()[0] == site.server.address
        assert site.client.asks("TCP", site.server.address) is None


class Application:
    """The ten services, running."""

    def __init__(self, site: Site, version: int) -> None:
        self.site = site
        self.version = version

    def compose(self, *arguments: str, check: bool = True) -> str:
        environment = {"WEB_PORT": str(WEB_PORT), "COMPOSE_PROJECT_NAME": f"ten{self.version}"}
        done = self.site.host.engine.compose(
            TEN_SERVICES, *arguments, version=self.version, environment=environment, check=check
        )
        return done.stdout

    def container(self, service: str) -> str:
        found = self.site.host.engine.containers(f"{SERVICE}={service}")
        assert len(found) == 1, f"{service}: {found}"
        return found[0]

    def get(self, service: str, path: str) -> str:
        """Ask a service over its own loopback, so that only what it asks then meets policy.

        Nothing comes back from a service that does not listen yet.
        """
        port = 8080 if service == "web" else PORTS[service]
        url = f"http://127.0.0.1:{port}{path}"
        command = ("curl", "-s", "--max-time", "10", url)
        done = self.site.host.inside(self.container(service), *command, check=False)
        return str(done.stdout)

    def asks(self, service: str, other: str) -> str:
        """Return "ok", or what went wrong, when `service` asks `other` by its name."""
        return self.get(service, f"/ask/{urllib.parse.quote(other)}:{PORTS[other]}")

    def dependencies(self, service: str) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.get(service, "/deps") or "{}")
        return found


@pytest.fixture(scope="module", params=COMPOSE_VERSIONS, ids=["compose-1.29", "compose-2"])
def application(site: Site, request: pytest.FixtureRequest) -> Iterator[Application]:
    made = Application(site, request.param)
    try:
        made.compose("up", "-d")
        yield made
    finally:
        made.compose("down", "-t", "1", check=False)


@pytest.fixture(scope="module")
def split(site: Site, application: Application) -> Iterator[Application]:
    """The application under a policy per service, applied for the whole cluster."""
    site.cli("policy", "apply", "-f", str(POLICY), "--wait")
    try:
        yield application
    finally:
        site.cli("policy", "delete", "--all", "--force")
        wait_for(lambda: not site.json("policy", "get")["policies"], "policies gone")


def test_services_find_each_other(application: Application) -> None:
    for service, others in ALLOWED.items():
        wanted = dict.fromkeys(others, "ok")
        wait_for(partial(finds, application, service, wanted), f"{service} with all it depends on")


def finds(application: Application, service: str, wanted: dict[str, str]) -> bool:
    return application.dependencies(service) == wanted


def test_policy_allows_what_services_depend_on(split: Application) -> None:
    for service, others in ALLOWED.items():
        wanted = dict.fromkeys(others, "ok")
        wait_for(partial(finds, split, service, wanted), f"{service} with all it depends on")


def test_policy_denies_everything_else(split: Application) -> None:
    """Asked all at once: each denial takes the service's time-out."""
    pairs = [(service, other) for service, others in DENIED.items() for other in others]
    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = pool.map(lambda pair: split.asks(*pair), pairs)
        assert {
            pair: answer for pair, answer in zip(pairs, answers, strict=True) if "TimeoutError" not in answer
        } == {}


def test_only_the_published_service_is_reached_from_outside(split: Application) -> None:
    site = split.site
    url = f"http://{site.host.address}:{WEB_PORT}/"
    assert site.world.netns.run("curl", "-s", "--max-time", "5", url) == "web"
    endpoint = site.host.api(f"/v1/endpoint/container-id:{split.container('api')}")
    address = endpoint["status"]["networking"]["addressing"][0]["ipv4"]
    assert site.world.asks("TCP", address, PORTS["api"]) is None
