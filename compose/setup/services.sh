# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Shared by what brings services up (up.sh, member.sh, join.sh; sourced after lib.sh): the engine, images, files put
# where they are read, a compose file started, and the agent waited for.

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

# images NAME...: those that are needed here.  They are taken as they are where a variable names them (HOLDFAST_IMAGE,
# HOLDFAST_ETCD_IMAGE: a fleet has them in its own registry) or an archive has them (HOLDFAST_IMAGES, of `docker save`);
# otherwise they are built from this checkout.
images() {
    local name
    if [ -n "${HOLDFAST_IMAGES:-}" ]; then
        load_images "$@"
    elif are_named "$@"; then
        for name in "$@"; do have_image "$name"; done
    else
        "$SETUP/wheels.sh"
        "$SETUP/base_image.sh"
        "$SETUP/image.sh"
    fi
}

are_named() {
    local name
    for name in "$@"; do
        case $name in
        "${HOLDFAST_IMAGE:-}" | "${HOLDFAST_ETCD_IMAGE:-}") ;;
        *) return 1 ;;
        esac
    done
}

have_image() {
    docker image inspect "$1" >/dev/null 2>&1 || run_step "pulling $1" docker pull --quiet "$1"
}

load_images() {
    local name
    [ -r "$HOLDFAST_IMAGES" ] || die "there is no archive of images at $HOLDFAST_IMAGES"
    run_step "loading $HOLDFAST_IMAGES" docker load --input "$HOLDFAST_IMAGES"
    for name in "$@"; do
        docker image inspect "$name" >/dev/null 2>&1 || die "the archive $HOLDFAST_IMAGES has no image $name"
    done
}

# What needs no root comes before root is asked for: pip's configuration may be the user's.
prepare() {
    "$SETUP/packages.sh" @engine
    [ -n "${HOLDFAST_IMAGES:-}" ] || are_named "$@" || "$SETUP/wheels.sh"
}

# needs DIRECTORY FILE...: a machine's folder is complete.
needs() {
    local directory=$1 file
    shift
    [ -d "$directory" ] || die "there is no folder $directory: \`make certs\` makes one for each machine of an inventory"
    for file in "$@"; do
        [ -r "$directory/$file" ] || die "$directory has no $file: is it the right folder? (\`make certs\` makes them)"
    done
}

# put FILE TARGET MODE: copy a file to where it is read; one that is the same is not touched.
PUT_ANY=
put() {
    local file=$1 target=$2 mode=$3
    on_host cmp -s "$file" "$target" && return 0
    on_host install -D -m "$mode" "$file" "$target"
    PUT_ANY=1
}

# put_holder HOLDER FOLDER DIRECTORY: the same for a certificate and its key.
put_holder() {
    local holder=$1 folder=$2 directory=$3
    put "$folder/ca.crt" "$directory/ca.crt" 644
    put "$folder/$holder.crt" "$directory/$holder.crt" 644
    put "$folder/$holder.key" "$directory/$holder.key" 600
}

# start_services ROLE PROJECT OPTION...: have compose start the file of a role.
start_services() {
    local role=$1 project=$2
    shift 2
    mkdir -p "$LOGS"
    compose --project-name "$project" "$@" --file "$REPO/compose/$role/docker-compose.yml" up --detach --remove-orphans \
        >"$LOGS/compose-up.log" 2>&1 || {
        tail -n 30 "$LOGS/compose-up.log" >&2
        die "compose up failed"
    }
}

# restart_with_new_files ROLE CONTAINER: if files were put, restart the container of a role that ran before and was
# not replaced; it has read the old ones.
restart_with_new_files() {
    local role=$1 before=$2
    [ -n "$PUT_ANY" ] && [ -n "$before" ] && [ "$before" = "$(container_of "$role")" ] || return 0
    say "restarting the $role: its files have changed"
    docker restart "$before" >/dev/null
}

# --- the agent

wait_for_agent() {
    wait_until "$HEALTHY_SECONDS" "the agent to be healthy" healthy_or_hopeless || true
    healthy || not_healthy
}

healthy() { docker exec "$(container_of agent)" holdfast status; } >/dev/null 2>&1

# Healthy is also who waits for its turn to ask etcd.
connected() { [[ "$(docker exec "$(container_of agent)" holdfast status)" =~ KVStore:\ *Ok ]]; } 2>/dev/null

# An agent that ended several times since it was started will not become healthy by waiting.
healthy_or_hopeless() { healthy || [ "$(restarts_of agent)" -ge 3 ]; }

container_of() { docker ps --all --quiet --filter "label=holdfast.role=$1" | head -n 1; }

restarts_of() { docker inspect --format '{{.RestartCount}}' "$(container_of "$1")"; }

not_healthy() {
    docker logs --tail 30 "$(container_of agent)" >&2 || true
    docker exec "$(container_of agent)" holdfast status >&2 || true
    die "the agent is not healthy; its whole log: docker logs $(container_of agent)"
}

# Compose makes a project's networks before its containers, so the driver's network can not be part of it.
network() {
    docker network inspect holdfast >/dev/null 2>&1 && return 0
    docker network create --driver holdfast --ipam-driver null holdfast >/dev/null
}
