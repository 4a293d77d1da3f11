#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Build the two images from the checkout.  Nothing is built when they carry the label of these very sources.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

LABEL=holdfast.sources
# What .dockerignore lets through, plus what decides how it is built.
INPUTS="agent bpf certs cli core datapath external_resources identity kvstore policy prestart
compose/image compose/Dockerfile compose/.cache/wheels/requirements.txt pyproject.toml README.md LICENSE .dockerignore"

sources_digest() {
    local inputs=() input
    for input in $INPUTS; do
        [ ! -e "$REPO/$input" ] || inputs+=("$input")
    done
    (cd "$REPO" && find "${inputs[@]}" -type f ! -path '*/__pycache__/*' ! -path 'bpf/build/*' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16)
}

built_from() {
    docker image inspect --format "{{index .Config.Labels \"$LABEL\"}}" "$1" 2>/dev/null || true
}

build() {
    local target=$1 image=$2
    [ "$(built_from "$image")" != "$DIGEST" ] || return 0
    # The classic builder uses a base image that only this engine has; and it is everywhere.
    run_step "building the image $image" env DOCKER_BUILDKIT="${DOCKER_BUILDKIT:-0}" \
        docker build --network "${HOLDFAST_BUILD_NETWORK:-default}" --label "$LABEL=$DIGEST" \
        --target "$target" --tag "$image" --file "$REPO/compose/Dockerfile" "$REPO"
}

DIGEST=$(sources_digest)
build etcd "$ETCD_IMAGE"
build agent "$AGENT_IMAGE"
# What these names pointed to before; intermediate stages stay, they are the cache.
docker image prune --force --filter "label=$LABEL" >/dev/null
