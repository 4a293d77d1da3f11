#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#   fleet.sh INVENTORY    beside the inventory, a folder for each machine: certificates, etcd.config, member.env
#
# By `holdfast certs fleet` in the agent's image.  What is there and good stays: a machine is added by a line and a
# further run.  The CA's key stays in ca/, beside the inventory: nobody else needs it.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=compose/setup/services.sh
. "$SETUP/services.sh"

INVENTORY=${1:-}

make_folders() {
    local directory=$1
    docker run --rm --network none --volume "$directory:$directory" --workdir "$directory" "$AGENT_IMAGE" \
        holdfast certs fleet "$INVENTORY"
}

[ -n "$INVENTORY" ] || die "which inventory? make certs INVENTORY=fleet/inventory.yaml (docs/installation.md shows one)"
INVENTORY=$(readlink -f "$INVENTORY") && [ -r "$INVENTORY" ] || die "there is no inventory at $1"
prepare "$AGENT_IMAGE"
require_root "$@"
engine
images "$AGENT_IMAGE"
(umask 077 && make_folders "${INVENTORY%/*}") || die "no certificates were made"
