#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# packages.sh NAME...: install the Debian packages that are missing.  A group is named by a leading @:
#   @build   what compiles bpf/        @test   what the tests run besides      @engine   docker and a compose

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

group() {
    case $1 in
    @build) echo "clang llvm libbpf-dev libbpf1 make" ;;
    @test) echo "bpftool etcd-server etcd-client iproute2 iptables nftables mmdebstrap debian-archive-keyring" \
        "slirp4netns socat netcat-openbsd iperf3 iputils-ping tcpdump ethtool curl procps" ;;
    @engine) engine_packages ;;
    *) echo "$1" ;;
    esac
}

engine_packages() {
    have dockerd || echo "docker.io iptables"
    have_compose || compose_package
}

# Ubuntu calls the plugin docker-compose-v2; Debian's docker-compose is 1.29 (bookworm) or 2.x (trixie).
compose_package() {
    if apt-cache show docker-compose-v2 >/dev/null 2>&1; then
        echo docker-compose-v2
    else
        echo docker-compose
    fi
}

wanted() {
    local name
    for name in "$@"; do group "$name"; done
}

missing() {
    local name
    for name in $(wanted "$@"); do
        package_installed "$name" || echo "$name"
    done
}

[ -n "$(missing "$@")" ] || exit 0
require_root "$@"
# shellcheck disable=SC2046 # one word per package
install_packages $(missing "$@")
