#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#   up.sh          a healthy all-in-one host: engine, images, certificates, etcd, agent, network, command
#   up.sh image    the images alone
#
# Every step looks first whether it is done already: a second run takes a few seconds.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=compose/setup/services.sh
. "$SETUP/services.sh"

up() {
    prepare "$AGENT_IMAGE" "$ETCD_IMAGE"
    require_root "$@"
    engine
    mount_socket
    images "$AGENT_IMAGE" "$ETCD_IMAGE"
    "$SETUP/host.sh"
    "$SETUP/certs.sh"
    say "starting etcd and the agent"
    start_services all-in-one holdfast
    wait_for_agent
    network
    tell
}

tell() {
    docker exec "$(container_of agent)" holdfast status
    cat <<EOT

This host enforces.  The command is ${HOLDFAST_BIN_DIR:-/usr/local/bin}/holdfast; containers join by the network's name:

  docker run -d --name web --network holdfast -l app=web IMAGE
  holdfast endpoint list
  holdfast policy apply -f POLICY.yaml
  make demo                  # two containers and a VM: one flow allowed, one denied, and why
EOT
    [ -z "${DOCKER_HOST:-}" ] || printf '\n  export DOCKER_HOST=%s   # the engine that was started for this\n' "$DOCKER_HOST"
}

case ${1:-up} in
up) up "$@" ;;
image)
    prepare "$AGENT_IMAGE" "$ETCD_IMAGE"
    require_root "$@"
    engine
    images "$AGENT_IMAGE" "$ETCD_IMAGE"
    ;;
*) die "usage: up.sh [image]" ;;
esac
