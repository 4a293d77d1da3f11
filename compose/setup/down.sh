#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Stop the services that `make up` started.  Programs and maps stay in the kernel: what was allowed and what
# was denied stays so.  `holdfast cleanup --all` is what removes them.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

require_root "$@"
if [ -S "$ENGINE_SOCKET" ] && [ -z "${DOCKER_HOST:-}" ]; then
    export DOCKER_HOST=unix://$ENGINE_SOCKET
fi
docker version >/dev/null 2>&1 || die "no docker engine answers: nothing to stop"
compose --project-name holdfast --file "$REPO/compose/all-in-one/docker-compose.yml" down --timeout 20
say "stopped etcd and the agent; containers, policy and connections stay as they are"
say "make up starts them again; holdfast cleanup --all removes everything from this host"
