#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#   join.sh [FOLDER] [ETCD] [OPERATOR]    this machine as a host of the cluster: the agent alone, from compose/host
#
#   FOLDER      its certificate and etcd.config (fleet/hosts/NAME, made by fleet.sh); without it, what is in
#               /etc/holdfast already
#   ETCD        URLs of etcd with commas between them, where etcd.config is to say others
#   OPERATOR    an operator's folder (fleet/operators/NAME), for a host from which policy is written
#
# Every step looks first whether it is done already.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=compose/setup/services.sh
. "$SETUP/services.sh"

FOLDER=${1:-} ETCD=${2:-} OPERATOR=${3:-}
CERTS=/etc/holdfast/certs
CONFIG=/etc/holdfast/etcd.config

check_folders() {
    [ -z "$FOLDER" ] || needs "$FOLDER" ca.crt agent.crt agent.key
    [ -z "$OPERATOR" ] || needs "$OPERATOR" ca.crt operator.crt operator.key etcd.config
    [ -n "$FOLDER" ] || on_host test -r "$CERTS/agent.crt" ||
        die "there is no certificate in $CERTS: make join FOLDER=fleet/hosts/NAME"
    [ -n "$ETCD" ] || [ -r "$FOLDER/etcd.config" ] || on_host test -r "$CONFIG" ||
        die "nothing says where etcd is: make join ETCD=URL,URL (docs/installation.md)"
    [ -z "$(docker ps --quiet --filter label=com.docker.compose.project=holdfast --filter label=holdfast.role=etcd)" ] ||
        die "this host has an etcd of its own (make up): make down first"
}

# The node's name is the certificate's: rights in etcd go by it.
check_certificate() {
    local directory=${FOLDER:-$CERTS} name found
    name=$(on_host cat /etc/holdfast/config/node-name 2>/dev/null || echo auto)
    [ "$name" != auto ] || name=$(on_host hostname)
    found=$(docker run --rm --network none --volume "$directory:/pki/agent:ro" "$AGENT_IMAGE" \
        holdfast certs check --dir /pki --agent "$name" 2>&1) || die "${found//\/pki\/agent/$directory}"
}

# What is to be the agent's etcd.config.
choose_configuration() {
    NEW_CONFIG=$CONFIG
    [ -z "$FOLDER" ] || NEW_CONFIG=$FOLDER/etcd.config
    [ -n "$ETCD" ] || return 0
    NEW_CONFIG=$LOGS/etcd.config
    mkdir -p "$LOGS"
    configuration >"$NEW_CONFIG"
}

put_folders() {
    [ -z "$FOLDER" ] || put_holder agent "$FOLDER" "$CERTS"
    put "$NEW_CONFIG" "$CONFIG" 644
    [ -z "$OPERATOR" ] || put_holder operator "$OPERATOR" /etc/holdfast/operator
    [ -z "$OPERATOR" ] || put "$OPERATOR/etcd.config" /etc/holdfast/operator/etcd.config 644
}

configuration() {
    local url
    echo "endpoints:"
    for url in ${ETCD//,/ }; do echo "- $url"; done
    printf '%s\n' "trusted-ca-file: $CERTS/ca.crt" "cert-file: $CERTS/agent.crt" "key-file: $CERTS/agent.key"
}

# An agent waits for etcd for ever; who has just typed an address wants to know now.
check_etcd() {
    local status=0 found
    found=$(docker run --rm --network host --volume "${FOLDER:-$CERTS}:$CERTS:ro" --volume "$NEW_CONFIG:$CONFIG:ro" \
        "$AGENT_IMAGE" holdfast kvstore status --etcd-config "$CONFIG" 2>&1) || status=$?
    printf '%s\n' "$found" >&2
    [ "$status" -le 1 ] || die "etcd can not be used as $NEW_CONFIG says; nothing was changed"
}

tell() {
    docker exec "$(container_of agent)" holdfast status
    cat <<EOT

This host enforces.  Containers join by the network's name:

  docker run -d --name web --network holdfast -l app=web IMAGE
  holdfast endpoint list
  holdfast node list
EOT
}

[ -z "$FOLDER" ] || FOLDER=$(readlink -f "$FOLDER") || die "there is no folder $1"
[ -z "$OPERATOR" ] || OPERATOR=$(readlink -f "$OPERATOR") || die "there is no folder $3"
prepare "$AGENT_IMAGE"
require_root "$@"
engine
mount_socket
check_folders
images "$AGENT_IMAGE"
"$SETUP/host.sh"
check_certificate
choose_configuration
check_etcd
put_folders
say "starting the agent"
before=$(container_of agent)
start_services host holdfast
restart_with_new_files agent "$before"
wait_for_agent
wait_until "$HEALTHY_SECONDS" "the agent's first answer from etcd" connected || not_healthy
network
tell
