# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2034 # what is set here is used by those who source it
#
# Shared by the setup scripts (sourced, never run): where things are, how progress is told, how root is
# reached, how missing packages come.  Each script does one step, can be repeated, and says what it did.

set -euo pipefail

SETUP=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$SETUP/../.." && pwd)
CACHE=$REPO/compose/.cache
LOGS=$CACHE/log-$(id -un) # a user's own, and root's
# What an engine that we start ourselves keeps: data, sockets, pid files, logs.
ENGINE_DIR=${HOLDFAST_ENGINE_DIR:-/var/lib/holdfast-engine}
# In a directory with nothing else: the agent's container has that directory.
ENGINE_SOCKET=$ENGINE_DIR/run/docker.sock
# etcd's data and all certificates with the CA's key: what a host must not lose.
STATE_DIR=${HOLDFAST_STATE_DIR:-$REPO/compose/all-in-one/state}
BASE_IMAGE=debian:bookworm-slim
AGENT_IMAGE=${HOLDFAST_IMAGE:-holdfast/agent:latest}
ETCD_IMAGE=${HOLDFAST_ETCD_IMAGE:-holdfast/etcd:latest}
# One clock for all steps of a chore.
export HOLDFAST_STARTED=${HOLDFAST_STARTED:-$EPOCHSECONDS}

say() { printf '[%3ds] %s\n' $((EPOCHSECONDS - HOLDFAST_STARTED)) "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# What is set of the caller's environment when root goes on.
CROSSES_SUDO=CI,DOCKER_HOST,HOLDFAST_ENGINE_DIR,HOLDFAST_STATE_DIR,HOLDFAST_BIN_DIR,HOLDFAST_ETCD_DIR,HOLDFAST_NODES
CROSSES_SUDO+=,HOLDFAST_IMAGE,HOLDFAST_ETCD_IMAGE,HOLDFAST_IMAGES,HOLDFAST_START_NOW,HOLDFAST_CLUSTER_STATE

# Root is needed for packages, mounts and the engine's socket.
require_root() {
    [ "$(id -u)" = 0 ] && return 0
    have sudo || die "this needs root, and sudo is not installed: run it as root"
    say "root is needed: sudo asks for it"
    exec sudo --preserve-env="$CROSSES_SUDO" "$0" "$@"
}

# Run a long step quietly into a log; a line of life every ten seconds; the log's end if it fails.
run_step() {
    local what=$1 log status=0 ticker
    shift
    mkdir -p "$LOGS"
    log=$LOGS/$(printf '%.50s' "$what" | tr -c 'a-zA-Z0-9' '-').log
    say "$what"
    # Not by sleep: it would outlive the step, and hold open whatever our output is piped to.
    (exec 0<> <(:) && until read -r -t 10; do say "  still: $what (log: ${log#"$REPO"/})"; done) &
    ticker=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    [ "$status" = 0 ] && return 0
    tail -n 30 "$log" >&2
    die "$what failed with status $status; the whole log is $log"
}

package_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# Install what is missing of the named Debian packages: nothing at all happens when all are there.
install_packages() {
    local missing=() name
    for name in "$@"; do
        package_installed "$name" || missing+=("$name")
    done
    [ ${#missing[@]} = 0 ] && return 0
    have apt-get || die "missing packages (${missing[*]}), and this system has no apt-get: install them by hand"
    update_package_lists
    run_step "installing ${missing[*]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${missing[@]}"
}

update_package_lists() {
    [ -z "${PACKAGE_LISTS_FRESH:-}" ] || return 0
    run_step "apt-get update" apt-get update
    export PACKAGE_LISTS_FRESH=1
}

# The engine's host: this machine, or the private one that engine.sh made.
on_host() {
    if [ -e "$ENGINE_DIR/host/pid" ] && [ "${DOCKER_HOST:-}" = "unix://$ENGINE_SOCKET" ]; then
        "$SETUP/private_host.sh" exec "$ENGINE_DIR/host" "$@"
    else
        "$@"
    fi
}

# docker-compose 1.29 as a command of its own, or 2.x as docker's plugin: whichever is here.
compose() {
    if docker compose version >/dev/null 2>&1; then
        docker compose "$@"
    else
        docker-compose "$@"
    fi
}

have_compose() { docker compose version >/dev/null 2>&1 || docker-compose version >/dev/null 2>&1; }

# wait_until SECONDS WHAT COMMAND...: bounded, with a line of life every ten seconds.
wait_until() {
    local limit=$1 what=$2 begun=$SECONDS told=$SECONDS
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $((SECONDS - begun)) -lt "$limit" ] || return 1
        if [ $((SECONDS - told)) -ge 10 ]; then
            told=$SECONDS
            say "  waiting for $what ($((SECONDS - begun)) of at most $limit s)"
        fi
        sleep 0.2
    done
}
