#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#   python.sh venv   make .venv in the checkout (Python 3.11 or later) if it is not there; print its python
#   python.sh dev    the same, and install the project with its development packages into it

# shellcheck source=compose/setup/lib.sh
. "$(dirname "$0")/lib.sh"

VENV=$REPO/.venv
CANDIDATES="python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3"

good_python() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in $CANDIDATES; do
        good_python "$candidate" && printf '%s\n' "$candidate" && return 0
    done
    return 1
}

# The distribution's default if that is new enough (Debian 12, Ubuntu 24.04), else its 3.11 (Ubuntu 22.04).
install_python() {
    "$SETUP/packages.sh" python3 python3-venv
    find_python >/dev/null && return 0
    "$SETUP/packages.sh" python3.11 python3.11-venv
    find_python >/dev/null || die "no Python 3.11 or later with venv: install one and put it on PATH"
}

venv() {
    if [ ! -x "$VENV/bin/python" ]; then
        find_python >/dev/null || install_python
        run_step "making .venv with $(find_python)" "$(find_python)" -m venv "$VENV"
    fi
    printf '%s\n' "$VENV/bin/python"
}

dev() {
    local stamp
    venv
    stamp=$VENV/.installed-$(sha256sum "$REPO/pyproject.toml" | cut -c1-16)
    [ ! -e "$stamp" ] || return 0
    run_step "installing the project and its development packages into .venv" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --editable "${REPO}[chart,dev]"
    touch "$stamp"
}

case ${1:-} in
venv | dev) "$1" ;;
*) die "usage: python.sh venv|dev" ;;
esac
