# SPDX-License-Identifier: Apache-2.0
"""Between two hosts whose network loses what is longer than it carries, and tells nobody."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.bulk import Bulk
from tests.support.netns import Netns
from tests.support.require import require_root, require_tools
from tests.support.twohosts import FAMILIES, Side, address, two_hosts, wire_address

INGRESS, EGRESS = 0, 1
CARRIED = 1400
TOO_BIG = (136, 2)
# Long enough for the kernel to send a lost packet again four times.
SILENCE_S = 3.0


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    """Hosts that send packets of 1500 bytes by a network that carries 1400."""
    require_root()
    require_tools("ip", "nsenter", "sysctl", "ping", "nft", "ethtool")
    with two_hosts(tunnel=True, enforced=True) as made:
        for side in made:
            side.allow(EGRESS)
            side.allow(INGRESS)
            side.host.cut_on_the_wire("wire")
            side.host.narrow("wire", CARRIED)
        yield made


def tell(sides: tuple[Side, Side], size: int = CARRIED) -> None:
    """Have each host know what arrives at the other."""
    for side in sides:
        side.path_mtus.upsert([(wire_address(side.other), size)])


def bulk_of(sides: tuple[Side, Side], family: int) -> Bulk:
    one, two = sides
    return Bulk(one.endpoint, two.endpoint, address(2, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bulk_transfer_stands_still_until_what_arrives_is_known(
    sides: tuple[Side, Side], family: int
) -> None:
    with contextlib.closing(bulk_of(sides, family)) as bulk:
        assert not bulk.arrives(SILENCE_S)
        assert bulk.received == 0
        tell(sides)
        assert bulk.arrives(20)
    assert sides[0].dropped()[TOO_BIG] > 0
    with contextlib.closing(bulk_of(sides, family)) as another:
        assert another.arrives(SILENCE_S)


def fits(source: Netns, target: str, size: int) -> subprocess.CompletedProcess[str]:
    """Send one echo request whose packet has `size` bytes and may not be cut."""
    payload = size - (48 if ":" in target else 28)
    words = ["ping", "-n", "-c", "1", "-W", "1", "-M", "do", "-s", str(payload), target]
    return subprocess.run(source.command(words), capture_output=True, text=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fits_passes_and_what_does_not_is_answered(sides: tuple[Side, Side], family: int) -> None:
    """To the byte: the gateway names the size that passes."""
    tell(sides)
    one, inside = sides[0].endpoint, CARRIED - 50
    assert fits(one, address(2, family), inside).returncode == 0
    refused = fits(one, address(2, family), inside + 1)
    assert refused.returncode != 0
    assert f"mtu={inside}" in refused.stdout.replace(" ", "").replace("mtu:", "mtu="), refused.stdout
    assert sides[0].dropped()[TOO_BIG] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_who_may_cut_his_packets_does_so_once_he_is_told(sides: tuple[Side, Side], family: int) -> None:
    """The first is lost and answered, the next ones come in pieces that fit."""
    tell(sides)
    words = ["ping", "-n", "-c", "4", "-i", "0.2", "-W", "1", "-s", "4000", address(2, family)]
    done = subprocess.run(sides[0].endpoint.command(words), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ipv6_is_told_no_less_than_it_must_believe(sides: tuple[Side, Side]) -> None:
    tell(sides, 1300)
    one, two = sides[0].endpoint, address(2, 6)
    assert fits(one, two, 1280).returncode == 0
    assert "1280" in fits(one, two, 1281).stdout
