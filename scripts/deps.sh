#!/bin/bash
# Installs the Debian packages that are missing for the named sets (default: all): build, test, demo,
# lint. As root or through sudo; otherwise prints the one line to run and fails. Silent when nothing
# is missing. Elsewhere than on Debian and its children it does nothing: INSTALL.md says what to do.
set -eu
declare -A sets=(
    [build]="gcc g++ libc6-dev make pkg-config openmpi-bin libopenmpi-dev libhdf5-openmpi-dev
             libconfig-dev libjpeg62-turbo-dev libpng-dev libjansson-dev libxxhash-dev zlib1g-dev
             libdnnl-dev"
    [test]="libcmocka-dev"
    [demo]="dataset-fashion-mnist"
    [lint]="clang-format-14 shellcheck"
)

command -v dpkg-query >/dev/null || exit 0

[ $# -gt 0 ] || set -- build test demo lint
missing=()
for name in "$@"; do
    for package in ${sets[$name]:?no such set: $name}; do
        state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || missing+=("$package")
    done
done
[ ${#missing[@]} -gt 0 ] || exit 0

run=()
if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
        run=(sudo)
    else
        echo 'These packages are missing; run as root:' >&2
        echo "  apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
fi

install() {
    "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        "${missing[@]}" </dev/null
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "installing ${missing[*]}"
# The package lists of a fresh machine are empty or old: fetch them only when they are needed.
if ! install >"$log" 2>&1 && ! { "${run[@]}" apt-get update -q && install; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "apt-get failed; run it by hand: apt-get install ${missing[*]}" >&2
    exit 1
fi
