#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The base image, also where no registry can be reached: if the engine neither has debian:bookworm-slim nor
# can pull it within half a minute, it is made from this machine's own Debian mirror with mmdebstrap and
# imported under the same name.  The root file system is kept in compose/.cache: copy that file to an
# air-gapped machine and nothing is fetched there.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

ROOTFS=$CACHE/bookworm-rootfs-$(dpkg --print-architecture).tar
PULL_SECONDS=30
SUITE=bookworm

present() { docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; }

pull() {
    [ -z "${HOLDFAST_NO_PULL:-}" ] && [ ! -f "$ROOTFS" ] || return 1
    say "pulling $BASE_IMAGE (at most $PULL_SECONDS s)"
    timeout "$PULL_SECONDS" docker pull --quiet "$BASE_IMAGE" >/dev/null 2>&1
}

make_rootfs() {
    install_packages mmdebstrap debian-archive-keyring
    mkdir -p "$CACHE"
    # shellcheck disable=SC2046 # one word or none
    run_step "no registry in reach: making $BASE_IMAGE with mmdebstrap" \
        mmdebstrap --mode=root --variant=minbase --include=ca-certificates $(merged_usr) \
        --customize-hook="'$SETUP/base_image.sh' customize \"\$1\"" \
        "$SUITE" "$CACHE/new-rootfs.tar" $(sources)
    mv "$CACHE/new-rootfs.tar" "$ROOTFS"
}

# As Debian's own image has it: else the package that merges /usr comes, and with it all of Perl (48 MB).
merged_usr() {
    local hooks=/usr/share/mmdebstrap/hooks/merged-usr
    [ ! -d "$hooks" ] || printf -- '--include=usr-is-merged --hook-dir=%s\n' "$hooks"
}

# This machine's own mirrors when it is the same Debian release; else Debian's public ones.
sources() {
    local file
    for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list; do
        if [ -e "$file" ] && grep -q debian "$file" && grep -q "$SUITE" "$file"; then
            printf '%s\n' "$file"
            return
        fi
    done
}

# Runs inside mmdebstrap: the machine's own certificate authorities, and no caches in the image.
customize() {
    local root=$1
    if compgen -G '/usr/local/share/ca-certificates/*.crt' >/dev/null; then
        cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
        chroot "$root" update-ca-certificates
    fi
    rm -rf "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* \
        "$root"/usr/share/man/* "$root"/usr/share/locale/* "$root"/var/log/*.log
}

import_rootfs() {
    run_step "importing $BASE_IMAGE" docker import --change 'CMD ["bash"]' "$ROOTFS" "$BASE_IMAGE"
}

case ${1:-} in
customize) customize "$2" ;;
*)
    if ! present && ! pull; then
        [ -f "$ROOTFS" ] || make_rootfs
        import_rootfs
    fi
    ;;
esac
