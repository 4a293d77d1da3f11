#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The Python packages that go into the image, fetched here and copied in: pip then uses this machine's own
# configuration (proxy, mirror, certificates), the build needs no network for them, and the folder
# compose/.cache/wheels copied to an air-gapped machine is all that is needed there.

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

WHEELS=$CACHE/wheels
IMAGE_PYTHON=3.11 # Debian bookworm's
# Of contents alone: the cache is good at another path, too.
STAMP=$WHEELS/.complete-$(cat "$REPO/pyproject.toml" "$0" | sha256sum | cut -c1-16)

# Every tag that bookworm's glibc (2.36) can load; pip does not derive the older ones itself.
platforms() {
    local minor
    for minor in 36 35 34 31 28 27 24 17; do
        printf -- '--platform manylinux_2_%s_%s ' "$minor" "$(uname -m)"
    done
    printf -- '--platform manylinux2014_%s' "$(uname -m)"
}

requirements() {
    "$1" - "$REPO/pyproject.toml" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))
chart = project["project"]["optional-dependencies"]["chart"]
print(*project["project"]["dependencies"], *chart, *project["build-system"]["requires"], "wheel", sep="\n")
PYTHON
}

fetch() {
    local python
    python=$("$SETUP/python.sh" venv)
    rm -rf "$WHEELS.new"
    mkdir -p "$WHEELS.new"
    requirements "$python" >"$WHEELS.new/requirements.txt"
    # shellcheck disable=SC2046 # platforms prints several words
    run_step "fetching the image's Python packages" "$python" -m pip download --disable-pip-version-check \
        --no-input --only-binary=:all: --python-version "$IMAGE_PYTHON" --implementation cp $(platforms) \
        --dest "$WHEELS.new" --requirement "$WHEELS.new/requirements.txt"
    rm -rf "$WHEELS"
    mv "$WHEELS.new" "$WHEELS"
    touch "$STAMP"
}

[ -e "$STAMP" ] || fetch
