#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A docker engine to work with.  `engine.sh start` prints its DOCKER_HOST (empty: docker's own default):
# one that runs already is taken as it is; else docker.io is installed and started by the service manager,
# or directly where there is none; with CI set, in a private host (private_host.sh) that leaves the
# machine's own network rules alone.  `engine.sh stop` ends only an engine that this script started directly.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

OWN_SOCKET=unix://$ENGINE_SOCKET
# The private host's name, and so its node's: another directory is another host.
PRIVATE_NAME=holdfast-ci
[ -z "${HOLDFAST_ENGINE_DIR:-}" ] || PRIVATE_NAME=holdfast-$(printf '%s' "$ENGINE_DIR" | cksum | cut -d' ' -f1)

answers() { DOCKER_HOST=$1 docker version >/dev/null 2>&1; }

# Whatever `docker` on this machine talks to now, or an engine that we started before.
find_engine() {
    have docker || return 1
    if answers "${DOCKER_HOST:-}"; then
        printf '%s\n' "${DOCKER_HOST:-}"
    elif answers "$OWN_SOCKET"; then
        printf '%s\n' "$OWN_SOCKET"
    else
        return 1
    fi
}

start() {
    find_engine && return 0
    [ -z "${DOCKER_HOST:-}" ] || die "DOCKER_HOST is $DOCKER_HOST, but no engine answers there: start it, or unset DOCKER_HOST"
    have dockerd || install_packages docker.io iptables
    if [ -n "${CI:-}" ]; then
        start_private
    elif [ -d /run/systemd/system ]; then
        run_step "starting docker (systemd)" systemctl enable --now docker
    elif have rc-service; then
        run_step "starting docker (openrc)" rc-service docker start
    else
        start_directly
    fi
    find_engine || die "the docker engine was started but does not answer; its log: $ENGINE_DIR/dockerd.log, or the journal"
}

# No service manager: the engine at docker's own socket and directories, for everybody on this machine.
start_directly() {
    mkdir -p "$ENGINE_DIR"
    forget_dead /var/run/docker.pid
    share_mounts
    say "starting dockerd (no service manager here): log $ENGINE_DIR/dockerd.log"
    setsid dockerd --pidfile /var/run/docker.pid >>"$ENGINE_DIR/dockerd.log" 2>&1 </dev/null &
    wait_until 60 "the docker engine" answers ""
}

start_private() {
    have slirp4netns || install_packages slirp4netns
    stop_private
    mkdir -p "${ENGINE_SOCKET%/*}"
    say "starting dockerd in a private host (CI is set): log $ENGINE_DIR/dockerd.log"
    "$SETUP/private_host.sh" start "$ENGINE_DIR/host" "$PRIVATE_NAME" --uplink
    rm -rf "$ENGINE_DIR/exec" "$ENGINE_DIR/dockerd.pid"
    setsid "$SETUP/private_host.sh" exec "$ENGINE_DIR/host" dockerd \
        --data-root "$ENGINE_DIR/data" --exec-root "$ENGINE_DIR/exec" --pidfile "$ENGINE_DIR/dockerd.pid" \
        --host "$OWN_SOCKET" --cgroup-parent "/$PRIVATE_NAME" >>"$ENGINE_DIR/dockerd.log" 2>&1 </dev/null &
    wait_until 60 "the docker engine" answers "$OWN_SOCKET"
}

# Volumes with shared propagation need a shared root; without systemd nobody has made it so.
share_mounts() { mount --make-rshared /; }

# A killed engine leaves its pid file, and refuses to start while another process has that number.
forget_dead() {
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] || rm -f "$1"
}

stop_private() {
    [ ! -e "$ENGINE_DIR/host/name" ] || "$SETUP/private_host.sh" stop "$ENGINE_DIR/host"
    rm -f "$ENGINE_SOCKET"
}

stop() {
    if [ -e "$ENGINE_DIR/host/name" ]; then
        stop_private
        say "stopped the private engine (images stay in $ENGINE_DIR/data)"
    else
        say "the engine is not a private one of ours: left running"
    fi
}

require_root "$@"
case ${1:-} in
start | stop) "$1" ;;
*) die "usage: engine.sh start|stop" ;;
esac
