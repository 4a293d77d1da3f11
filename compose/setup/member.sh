#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#   member.sh [FOLDER]    this machine as the etcd member whose folder that is (fleet/members/NAME, made by fleet.sh)
#
# Without FOLDER, the one that was given the last time: a repeat is an upgrade.  Every step looks first whether it is
# done already.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=compose/setup/services.sh
. "$SETUP/services.sh"

MEMBER_DIR=/etc/holdfast/member
FOLDER=${1:-}
# Alone it can not serve: the others may not be there yet.
SERVING_SECONDS=15

setting() { on_host sed -n "s/^$1=//p" "$FOLDER/member.env"; }

# etcd ends with "cannot assign requested address", over and over; better said before.
check_address() {
    local address
    address=$(setting HOLDFAST_MEMBER_ADDRESS)
    address=${address//[\[\]]/}
    have ip || return 0
    [[ "$(on_host ip -o address show)" == *" $address/"* ]] ||
        die "$FOLDER/member.env says $address, and no card of this machine has that address: is it another's folder?"
}

put_folder() {
    on_host install -d -m 700 "$MEMBER_DIR" "$HOLDFAST_ETCD_DIR" "$HOLDFAST_ETCD_DIR/data" "$HOLDFAST_ETCD_DIR/maintenance"
    put_holder etcd "$FOLDER" "$MEMBER_DIR"
    put "$FOLDER/etcd.config" "$MEMBER_DIR/etcd.config" 644
    put "$FOLDER/member.env" "$MEMBER_DIR/member.env" 644
}

serves() { docker exec "$(container_of etcd)" etcdctl --command-timeout=2s endpoint health; } >/dev/null 2>&1

serves_or_hopeless() { serves || [ "$(restarts_of etcd)" -ge 3 ]; }

tell() {
    local member
    member=$(setting HOLDFAST_MEMBER)
    wait_until "$SERVING_SECONDS" "etcd to serve" serves_or_hopeless || true
    if [ "$(restarts_of etcd)" -ge 3 ]; then
        docker logs --tail 20 "$(container_of etcd)" >&2
        die "etcd ends again and again; its whole log: docker logs $(container_of etcd)"
    elif serves; then
        say "etcd member $member serves"
        docker exec "$(container_of maintenance)" holdfast kvstore status || true
    else
        say "etcd member $member runs and waits for the others ($(setting HOLDFAST_MEMBERS)): make member there"
    fi
}

[ -n "$FOLDER" ] || FOLDER=$MEMBER_DIR
[ "$FOLDER" = "$MEMBER_DIR" ] || FOLDER=$(readlink -f "$FOLDER") || die "there is no folder $1"
prepare "$AGENT_IMAGE" "$ETCD_IMAGE"
require_root "$@"
needs "$FOLDER" ca.crt etcd.crt etcd.key etcd.config member.env
HOLDFAST_ETCD_DIR=${HOLDFAST_ETCD_DIR:-$(setting HOLDFAST_ETCD_DIR)}
export HOLDFAST_ETCD_DIR=${HOLDFAST_ETCD_DIR:-/var/lib/holdfast-etcd}
check_address
engine
images "$AGENT_IMAGE" "$ETCD_IMAGE"
put_folder
say "starting the etcd member and its maintenance"
before=$(container_of maintenance)
start_services kvstore holdfast-kvstore --env-file "$FOLDER/member.env"
restart_with_new_files maintenance "$before"
tell
