# What the lints share. Sourced with the working directory at the top of the source tree.
# shellcheck shell=bash
set -u
errors=0

# files PATTERN...: the tree's own files, tracked or new but not ignored, that match a glob.
files() {
    if git rev-parse --git-dir >/dev/null 2>&1; then
        git ls-files --cached --others --exclude-standard -- "$@" | sort -u |
            while read -r f; do [ ! -f "$f" ] || echo "$f"; done
    else
        local pattern
        for pattern in "$@"; do
            find . -path ./build\* -prune -o -type f -path "./$pattern" -print
        done | sed 's|^\./||' | sort -u
    fi
}

error() {
    echo "$*"
    errors=$((errors + 1))
}

warn() {
    echo "warning: $*"
}

# code FILE: its lines as "number:text" without comments; directives stay.
code() {
    gcc -fpreprocessed -dD -E "$1" 2>/dev/null | awk '
        /^# [0-9]+ / { line = $2 - 1; next }
        { line++; if ($0 ~ /[^ \t]/) print line ":" $0 }'
}

finish() {
    [ "$errors" = 0 ]
    exit $?
}
