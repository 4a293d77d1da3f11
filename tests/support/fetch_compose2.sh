#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# fetch_compose2.sh TARGET: put docker compose 2.x there, from Debian trixie's package, without installing it:
# apt runs with directories of its own, on the mirror that this machine's apt already uses.

set -euo pipefail

TARGET=$1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

mirror() {
    apt-get indextargets --format '$(SITE)/ $(RELEASE)' 2>/dev/null | awk '/debian\/? / && !/security/ { print $1; exit }'
}

apt_privately() {
    apt-get -qq -o Dir::Etc::sourcelist="$WORK/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State="$WORK/state" -o Dir::Cache="$WORK/cache" -o APT::Sandbox::User=root "$@"
}

mkdir -p "$WORK/state/lists/partial" "$WORK/cache/archives/partial" "$(dirname "$TARGET")"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) trixie main" >"$WORK/sources.list"
apt_privately update
(cd "$WORK" && apt_privately download docker-compose)
dpkg -x "$WORK"/docker-compose_*.deb "$WORK/unpacked"
find "$WORK/unpacked" -name docker-compose -type f -perm -u+x -exec cp {} "$TARGET.new" \;
mv "$TARGET.new" "$TARGET"
