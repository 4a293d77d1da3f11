#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#   up.sh          a healthy all-in-one host: engine, images, certificates, etcd, agent, network, command
#   up.sh image    the images alone
#
# Every step looks first whether it is done already: a second run takes a few seconds.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

HEALTHY_SECONDS=120

engine() {
    DOCKER_HOST=$("$SETUP/engine.sh" start)
    if [ -n "$DOCKER_HOST" ]; then
        export DOCKER_HOST
    else
        unset DOCKER_HOST
    fi
    say "engine: docker $(docker version --format '{{.Server.Version}}') at ${DOCKER_HOST:-its default socket}"
}

# The agent's container gets the directory that the engine's socket is in.
mount_socket() {
    local named=${DOCKER_HOST:-unix:///var/run/docker.sock} socket
    socket=$(readlink -f "${named#unix://}" || true)
    [ -S "$socket" ] || die "no socket at $named: the agent needs an engine on this host's own unix socket (DOCKER_HOST)"
    export HOLDFAST_DOCKER_SOCKET_DIR=${socket%/*}
    export HOLDFAST_DOCKER_SOCKET_NAME=${socket##*/}
}

# Images that are named (HOLDFAST_IMAGE, HOLDFAST_ETCD_IMAGE: a fleet has them in its own registry) are taken as they
# are; otherwise they are built from this checkout.
images() {
    if [ -n "${HOLDFAST_IMAGE:-}" ] && [ -n "${HOLDFAST_ETCD_IMAGE:-}" ]; then
        have_image "$HOLDFAST_IMAGE"
        have_image "$HOLDFAST_ETCD_IMAGE"
    else
        "$SETUP/wheels.sh"
        "$SETUP/base_image.sh"
        "$SETUP/image.sh"
    fi
}

have_image() {
    docker image inspect "$1" >/dev/null 2>&1 || run_step "pulling $1" docker pull --quiet "$1"
}

# What needs no root comes before root is asked for: pip's configuration may be the user's.
prepare() {
    "$SETUP/packages.sh" @engine
    [ -n "${HOLDFAST_IMAGE:-}" ] || "$SETUP/wheels.sh"
}

start_services() {
    say "starting etcd and the agent"
    compose --project-name holdfast --file "$REPO/compose/all-in-one/docker-compose.yml" up --detach --remove-orphans \
        >"$LOGS/compose-up.log" 2>&1 || {
        tail -n 30 "$LOGS/compose-up.log" >&2
        die "compose up failed"
    }
    wait_until "$HEALTHY_SECONDS" "the agent to be healthy" healthy_or_hopeless || true
    healthy || not_healthy
}

healthy() { docker exec "$(agent_container)" holdfast status; } >/dev/null 2>&1

# An agent that ended several times since it was started will not become healthy by waiting.
healthy_or_hopeless() {
    healthy || [ "$(docker inspect --format '{{.RestartCount}}' "$(agent_container)")" -ge 3 ]
}

agent_container() { docker ps --all --quiet --filter label=holdfast.role=agent | head -n 1; }

not_healthy() {
    docker logs --tail 30 "$(agent_container)" >&2 || true
    docker exec "$(agent_container)" holdfast status >&2 || true
    die "the agent is not healthy; its whole log: docker logs $(agent_container)"
}

# Compose makes a project's networks before its containers, so the driver's network can not be part of it.
network() {
    docker network inspect holdfast >/dev/null 2>&1 && return 0
    docker network create --driver holdfast --ipam-driver null holdfast >/dev/null
}

up() {
    prepare
    require_root "$@"
    engine
    mount_socket
    images
    "$SETUP/host.sh"
    "$SETUP/certs.sh"
    start_services
    network
    tell
}

tell() {
    docker exec "$(agent_container)" holdfast status
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
    prepare
    require_root "$@"
    engine
    images
    ;;
*) die "usage: up.sh [image]" ;;
esac
