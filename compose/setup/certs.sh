#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The CA and the certificates of an all-in-one host, made by `python -m certs` in the agent's image, and put
# where each is used.  What is there and good stays as it is; the CA's key stays in the state directory.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=compose/setup/services.sh
. "$SETUP/services.sh"

CERTS=$STATE_DIR/certs

make_certificates() {
    docker run --rm --network none --volume "$CERTS:/certs" --entrypoint python "$AGENT_IMAGE" -m certs init \
        --dir /certs --etcd-name all-in-one --agent "$(on_host hostname)" --operator admin
}

on_host sh -c "umask 077; mkdir -p '$CERTS' '$STATE_DIR/etcd'"
run_step "certificates of the CA, etcd, this agent and the operator" make_certificates
put_holder agent "$CERTS/agent" /etc/holdfast/certs
put_holder operator "$CERTS/operator" /etc/holdfast/operator
put "$CERTS/agent/etcd.config" /etc/holdfast/etcd.config 644
put "$CERTS/operator/etcd.config" /etc/holdfast/operator/etcd.config 644
