#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# `make demo`: two containers (shop, till) and a VM (legacy: a network namespace behind a device of this host).
# One flow is allowed, one is denied, and the screen says why; then one line of policy changes that.
# Everything is removed at the end; `demo.sh --keep` leaves it to play with.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/../setup/lib.sh"

DEMO=$REPO/compose/demo
COMMAND=${HOLDFAST_BIN_DIR:-/usr/local/bin}/holdfast
VM=holdfast-demo-vm
VM_ADDRESS=198.18.77.2 # a range for tests of networks: nobody routes it
HOST_ADDRESS=198.18.77.1

title() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Show a command as it would be typed, then run it.
typed() {
    printf '  $ %s\n' "$(printf '%s' "$*" | sed "s|$COMMAND|holdfast|g; s|$DEMO/|compose/demo/|g")"
    "$@" 2>&1 | sed 's/^/    /'
}

demo_compose() { compose --project-name holdfast-demo --file "$DEMO/docker-compose.yml" "$@" 2>/dev/null; }

container_of() {
    docker ps --quiet --filter label=com.docker.compose.project=holdfast-demo \
        --filter "label=com.docker.compose.service=$1"
}

address_of_shop() {
    docker inspect --format '{{(index .NetworkSettings.Networks "holdfast").IPAddress}}' "$(container_of shop)"
}

# GET / from somewhere ("container ID" or "vm"); one word about what came of it.
ask_shop() {
    local script="import urllib.request; urllib.request.urlopen('http://$SHOP:8080/', timeout=2); print('allowed')"
    case $1 in
    till) docker exec "$(container_of till)" python3 -c "$script" 2>/dev/null || echo "denied (no answer in 2 s)" ;;
    vm) on_host ip netns exec "$VM" python3 -c "$script" 2>/dev/null || echo "denied (no answer in 2 s)" ;;
    esac
}

expect() {
    local who=$1 wanted=$2 result
    result=$(ask_shop "$who")
    printf '  %-4s -> shop:8080   %s\n' "$who" "$result"
    [[ $result == "$wanted"* ]] || die "this should have been $wanted: holdfast status, holdfast endpoint list"
}

start_vm() {
    on_host ip netns add "$VM"
    on_host ip link add hfdemo0 type veth peer name eth0 netns "$VM"
    on_host ip addr add "$HOST_ADDRESS/30" dev hfdemo0
    on_host ip link set hfdemo0 up
    on_host ip -n "$VM" addr add "$VM_ADDRESS/30" dev eth0
    on_host ip -n "$VM" link set eth0 up
    on_host ip -n "$VM" route add default via "$HOST_ADDRESS"
}

# What the kernel says while the VM tries: the first line about its address.
drop_while_vm_tries() {
    local lines monitor
    lines=$(mktemp)
    "$COMMAND" monitor -t drop >"$lines" 2>/dev/null </dev/null &
    monitor=$!
    sleep 1
    ask_shop vm >/dev/null
    kill "$monitor" 2>/dev/null || true
    wait "$monitor" 2>/dev/null || true
    grep -m 1 "$VM_ADDRESS" "$lines" || true
    rm -f "$lines"
}

explain() {
    local drop numbers
    drop=$(drop_while_vm_tries)
    [ -n "$drop" ] || die "the monitor saw no drop"
    printf '  $ holdfast monitor -t drop\n    %s\n' "$drop"
    numbers=$(printf '%s' "$drop" | sed -n 's/.*identity \([0-9]*\)->\([0-9]*\).*/\1 \2/p')
    for number in $numbers; do typed "$COMMAND" identity get "$number"; done
    echo "  The first is the VM, the second the shop; the shop's policy names only app=till."
}

remove() {
    "$COMMAND" policy delete demo-shop demo-legacy >/dev/null 2>&1 || true
    "$COMMAND" vm unregister demo-legacy >/dev/null 2>&1 || true
    demo_compose down --timeout 2 >/dev/null || true
    on_host ip netns del "$VM" 2>/dev/null || true
}

use_engine() {
    if [ -z "${DOCKER_HOST:-}" ] && [ -S "$ENGINE_SOCKET" ]; then
        export DOCKER_HOST=unix://$ENGINE_SOCKET
    fi
    "$COMMAND" status >/dev/null 2>&1 || die "no healthy agent on this host: make up starts one"
}

require_root "$@"
use_engine
remove # what an earlier demo may have left
[ "${1:-}" = --keep ] || trap remove EXIT

title "1. Two containers and a VM"
demo_compose up --detach
start_vm
typed "$COMMAND" vm register demo-legacy --ip "$VM_ADDRESS" -l app=legacy
SHOP=$(address_of_shop)
typed "$COMMAND" endpoint list

title "2. Without policy everybody may"
expect till allowed
expect vm allowed

title "3. Policy for the shop: tills only"
typed "$COMMAND" policy apply -f "$DEMO/shop.yaml"
sleep 1
expect till allowed
expect vm denied

title "4. Why: the kernel's own words"
explain

title "5. The VM is let in by its identity"
typed "$COMMAND" policy apply -f "$DEMO/legacy.yaml"
sleep 1
expect vm allowed

title "Done in $SECONDS s"
[ "${1:-}" = --keep ] || echo "Everything of the demo is removed again (compose/demo/demo.sh --keep leaves it)."
