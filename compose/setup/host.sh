#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What the compose files expect of the engine's host: directories, mounts, the sample configuration (only
# where there is none yet) and the `holdfast` command.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

BIN_DIR=${HOLDFAST_BIN_DIR:-/usr/local/bin}

# In the words of the host itself: runs there by on_host, so it uses nothing of this file.
PREPARE='
set -eu
umask 077
mkdir -p /etc/holdfast/config /etc/holdfast/policies /etc/holdfast/certs /etc/holdfast/operator /var/lib/holdfast
umask 022
mkdir -p /run/holdfast /run/docker/plugins /run/netns
grep -q " /sys/fs/bpf bpf " /proc/mounts || mount -t bpf bpf /sys/fs/bpf
mount --make-shared /sys/fs/bpf
'

shared() { on_host findmnt -n -o PROPAGATION --target "$1" | grep -q shared; }

# Volumes with propagation need it; systemd makes the root shared, and elsewhere nobody does.
share_root() { shared /run || on_host mount --make-rshared /; }

sample_configuration() {
    local file
    for file in "$REPO"/compose/config/*; do
        on_host test -e "/etc/holdfast/config/${file##*/}" ||
            on_host install -m 644 "$file" "/etc/holdfast/config/${file##*/}"
    done
}

# The engine's address is written into it where it is not docker's default.
install_command() {
    local engine=""
    [ "${DOCKER_HOST:-unix:///var/run/docker.sock}" = unix:///var/run/docker.sock ] || engine=$DOCKER_HOST
    mkdir -p "$BIN_DIR"
    sed -e "s|@ENGINE@|$engine|" -e "s|@IMAGE@|$AGENT_IMAGE|" "$REPO/compose/holdfast" >"$BIN_DIR/.holdfast.new"
    chmod 755 "$BIN_DIR/.holdfast.new"
    mv "$BIN_DIR/.holdfast.new" "$BIN_DIR/holdfast"
}

have findmnt || die "findmnt (util-linux) is missing"
on_host sh -c "$PREPARE"
share_root
sample_configuration
install_command
