#!/bin/bash
# Runs every lint of this folder. A lint prints "file:line: what" for each finding, on stdout, and
# fails when one of them is an error; lines that begin with "warning:" never fail. Exit status 77:
# its tool is not installed. Last line: "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
out=$(mktemp)
trap 'rm -f "$out"' EXIT
passed=0 failed=0 skipped=0
for lint in tests/lint/lint_*.sh; do
    name=$(basename "$lint" .sh) name=${name#lint_}
    bash "$lint" >"$out" 2>&1
    case $? in
    0) word=ok passed=$((passed + 1)) ;;
    77) word="skipped: $(tail -n 1 "$out")" skipped=$((skipped + 1)) ;;
    *) word=FAILED failed=$((failed + 1)) ;;
    esac
    printf 'lint/%-39s %s\n' "$name" "$word"
    [[ $word == skipped* ]] || sed 's/^/    /' "$out"
done
[ -z "${MD_TALLY:-}" ] || echo "$passed $failed $skipped" >"$MD_TALLY"
echo "$passed passed, $failed failed$([ "$skipped" = 0 ] || echo ", $skipped skipped")"
[ "$failed" = 0 ]
