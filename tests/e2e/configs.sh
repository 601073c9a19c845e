#!/bin/bash
# Every shipped config is free of errors, and config/reference.cfg is what the program would write.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for cfg in config/*.cfg config/models/*.cfg config/methods/*.cfg; do
    "$MD_HPC" config check "$cfg"
done
"$MD_HPC" config reference >"$scratch/reference.cfg"
diff config/reference.cfg "$scratch/reference.cfg"
# The check can fail.
if "$MD_HPC" config check vit_b.cfg optim.lrr=1 2>/dev/null; then
    echo "an unknown key passed the check"
    exit 1
fi
echo ok
