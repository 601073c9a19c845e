#!/bin/bash
# An installed program works from anywhere and finds its configs, its job scripts are where they look
# for each other; uninstall leaves no file behind.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
build=$(dirname "$MD_HPC")
run() { # TARGET, of the build that is being tested
    make -s "$1" BUILD="$build" SAN="${SAN:-}" DESTDIR="$scratch" PREFIX=/pre >/dev/null
}
run install
(cd "$scratch" && ./pre/bin/md_hpc config check vit_b.cfg)
(cd "$scratch" && ./pre/bin/md_hpc version >/dev/null)
for file in common.sh slurm/train.sbatch pbs/train.pbs site/generic.env; do
    cmp "jobscripts/$file" "$scratch/pre/share/md_hpc/jobscripts/$file"
done
run uninstall
[ -z "$(find "$scratch" -type f)" ]
echo ok
