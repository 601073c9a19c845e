#!/bin/bash
# The command line before any training: verbs, help, exit codes, config check | show | reference.
set -u
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

fail() {
    echo "$*"
    cat "$dir/out" "$dir/err"
    exit 1
}

# expect CODE OUT ERR ARGS...: exit code, and an extended regular expression that each stream holds
# ("" for an empty stream).
expect() {
    local code=$1 out=$2 err=$3
    shift 3
    "$MD_HPC" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    local rc=$?
    [ $rc = "$code" ] || fail "md_hpc $*: exit code $rc, not $code"
    if [ -n "$out" ]; then grep -qE "$out" "$dir/out"; else [ ! -s "$dir/out" ]; fi ||
        fail "md_hpc $*: standard output lacks: $out"
    if [ -n "$err" ]; then grep -qE "$err" "$dir/err"; else [ ! -s "$dir/err" ]; fi ||
        fail "md_hpc $*: standard error lacks: $err"
}

expect 0 '^usage: .*FILE.cfg' ''
expect 0 '^usage: .*FILE.cfg' '' -h
expect 0 '^usage: .*FILE.cfg' '' --help
expect 0 '^usage: .*FILE.cfg' '' help
expect 0 '^version +[0-9]+\.[0-9]+\.[0-9]+$' '' version
expect 0 'HDF5 [0-9]' '' --version
expect 64 '' '^md_hpc: error: version takes no arguments' version x
expect 64 '' 'neither a verb nor a .cfg file; did you mean "config"' confg
expect 64 '' 'see md_hpc help' qqqqqqq

# every verb explains itself, in two ways
verbs=$("$MD_HPC" help | sed -n 's/^  \([a-z]*\)  .*/\1/p')
[ "$(wc -w <<<"$verbs")" -ge 3 ] || fail "the overview lists too few verbs: $verbs"
for verb in $verbs; do
    expect 0 "^usage: .*md_hpc" '' help "$verb"
    expect 0 "^usage: .*md_hpc" '' "$verb" --help
done
expect 0 '^ 75  stopped with a checkpoint' '' help exit-codes
expect 0 'a number from 0 to 100; default 1.5e-3' '' help optim.lr
expect 0 '^optim.beta1' '' help optim
expect 0 '^check.every' '' help keys
expect 64 '' 'did you mean "optim.lr"' help optim.lt

cat >"$dir/good.cfg" <<'END'
@include "base.cfg"
optim = { lr = 0.002; };
END
echo 'model = { layers = 3; };' >"$dir/base.cfg"
cat >"$dir/bad.cfg" <<'END'
optim = { lr = "x";
          lrr = 1.0; };
END
expect 64 '' '^usage: md_hpc config' config
expect 64 '' 'wants a file' config check
expect 64 '' 'unknown option --dif' config show "$dir/good.cfg" --dif
expect 64 '' 'wants reference' config reference x
expect 66 '' 'no config file absent.cfg' config check absent.cfg
expect 0 '' '' config check "$dir/good.cfg"
expect 0 '' '' config check vit_h.cfg # from config/ beside the program
expect 78 '' 'command line: optim.lr must be' config check "$dir/good.cfg" optim.lr=1000
expect 78 '' 'bad.cfg:1: optim.lr must be' config check "$dir/bad.cfg"
grep -q 'bad.cfg:2: unknown key "optim.lrr"; did you mean "optim.lr"?' "$dir/err" ||
    fail "config check stopped at the first error"
[ "$(grep -c '^md_hpc: error: ' "$dir/err")" = 2 ] || fail "errors are not one per line"

expect 0 ' lr = 0.002; +# .*/good.cfg:2$' '' config show "$dir/good.cfg"
expect 0 ' layers = 3; +# .*/base.cfg:1$' '' config show "$dir/good.cfg"
expect 0 '^train.batch=64 +# command line, default 2048$' '' config show "$dir/good.cfg" --diff \
    train.batch=64
[ "$(wc -l <"$dir/out")" = 3 ] || fail "config show --diff: not the three keys that differ"

# what show and reference write can be read again, and says the same
"$MD_HPC" config show "$dir/good.cfg" >"$dir/shown.cfg" || exit 1
"$MD_HPC" config show "$dir/shown.cfg" | sed 's/ *#.*//' >"$dir/again"
sed 's/ *#.*//' "$dir/shown.cfg" | cmp - "$dir/again" || fail "config show does not reproduce itself"
"$MD_HPC" config reference >"$dir/reference.cfg" || exit 1
expect 0 '' '' config show "$dir/reference.cfg" --diff

# a full disk is an error, not half a file
"$MD_HPC" config reference >/dev/full 2>"$dir/err"
[ $? = 74 ] || fail "config reference >/dev/full: exit code"
echo ok
