#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A host inside this host: its own network, mounts, host name and process ids, but the same file system.
#
# An engine that is started in the machine's own namespace sets the policy of FORWARD to DROP for
# everybody and leaves its processes behind when it is killed.  In here it can do neither: killing the
# first process ends everything that was started inside.  `engine.sh` uses it when CI is set; the tests
# use it to have several hosts on one machine.
#
#   private_host.sh start DIR NAME [--uplink]   make it; --uplink: a way out by slirp4netns, no NAT rule needed
#   private_host.sh exec DIR COMMAND...         run a command inside, in the current directory
#   private_host.sh stop DIR                    end everything inside and remove it

set -euo pipefail

# Each of these is a directory of the host's own, kept under DIR/fs.
PRIVATE_DIRS="/run/docker /run/containerd /run/netns /run/holdfast /etc/docker /etc/holdfast
/var/lib/holdfast /var/lib/holdfast-etcd"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

start() {
    local dir=$1 name=$2 uplink=${3:-}
    [ ! -e "$dir/pid" ] || die "$dir already holds a private host; stop it first"
    mkdir -p "$dir/fs"
    printf '%s\n' "$name" >"$dir/name"
    ip netns add "$name"
    nsenter --net="/run/netns/$name" ip link set lo up
    [ "$uplink" != --uplink ] || start_uplink "$dir" "$name"
    setsid nsenter --net="/run/netns/$name" \
        unshare --mount --uts --pid --fork --propagation private \
        "$0" hold "$dir" "$name" >"$dir/log" 2>&1 </dev/null &
    wait_for "$dir/pid" || {
        cat "$dir/log" >&2
        stop "$dir"
        die "the private host $name did not start"
    }
}

# The first process of the new host: it makes the mounts, then reaps orphans until it is killed.
hold() {
    local dir=$1 name=$2 pid target
    read -r pid _ </proc/self/stat # /proc is still the machine's: the pid as seen from outside
    mount --make-rshared /
    mount -t proc proc /proc
    for target in $PRIVATE_DIRS; do
        mkdir -p "$dir/fs$target" "$target"
        mount --bind "$dir/fs$target" "$target"
    done
    [ ! -e "$dir/resolv.conf" ] || mount --bind "$dir/resolv.conf" "$(readlink -f /etc/resolv.conf)"
    mount -t bpf bpf /sys/fs/bpf
    hostname "$name"
    printf '%s\n' "$pid" >"$dir/pid.new"
    mv "$dir/pid.new" "$dir/pid"
    while :; do
        sleep infinity &
        wait $!
    done
}

# A way out without touching the machine's own rules: a tap device served by a user-space NAT.
start_uplink() {
    local dir=$1 name=$2
    echo "nameserver 10.0.2.3" >"$dir/resolv.conf"
    setsid slirp4netns --configure --mtu=65520 --disable-host-loopback --netns-type=path \
        "/run/netns/$name" tap0 >"$dir/uplink.log" 2>&1 </dev/null &
    echo $! >"$dir/uplink.pid"
}

wait_for() {
    local tried
    for tried in $(seq 100); do
        [ -e "$1" ] && return 0
        sleep 0.05
    done
    return "$((tried > 0))"
}

enter() {
    local dir=$1 pid
    shift
    read -r pid 2>/dev/null <"$dir/pid" || die "$dir holds no running private host"
    # shellcheck disable=SC2016 # $1 and $@ belong to the inner shell
    exec nsenter --target "$pid" --mount --uts --net --pid -- \
        sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@"
}

stop() {
    local dir=$1 name
    name=$(cat "$dir/name" 2>/dev/null) || return 0
    end_process "$dir/pid" "$name"
    end_process "$dir/uplink.pid" "/run/netns/$name"
    ip netns del "$name" 2>/dev/null || true
    find /sys/fs/cgroup -depth -type d -path "*/$name/*" -exec rmdir {} \; 2>/dev/null || true
    find /sys/fs/cgroup -depth -type d -name "$name" -exec rmdir {} \; 2>/dev/null || true
    rm -rf "$dir"
}

# SIGKILL, because the first process of a pid namespace ignores the polite ones; then wait until it is gone.
# After a reboot the number may be somebody else's: only a process whose command line has the word $2 is meant.
end_process() {
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    rm -f "$1"
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qFx -- "$2" || return 0
    kill -KILL "$pid" 2>/dev/null || true
    for _ in $(seq 200); do
        [ -e "/proc/$pid" ] || break
        sleep 0.05
    done
}

command=${1:-}
[ $# -lt 2 ] || shift
case $command in
start | hold | stop) "$command" "$@" ;;
exec) enter "$@" ;;
*) sed -n '5,14p' "$0" >&2 && exit 2 ;;
esac
