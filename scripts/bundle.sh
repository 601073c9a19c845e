#!/bin/bash
# A folder that runs on another x86-64 Linux machine: the program and its tests, the shared libraries
# they need, Open MPI with its plug-ins, configs and the scripts that test and measure a GPU.
#
#   scripts/bundle.sh        makes $BUILD/bundle/md_hpc-VERSION/ and the same as .tar.gz
#
# What the other machine must have: a C library at least as new as this one's symbols ask for (the
# last lines say), and for the GPU a driver and the libraries of NVIDIA that the program was linked
# with, from a CUDA toolkit or from Python packages (env.sh there looks for them). They are not
# copied: cuBLAS and NCCL alone have hundreds of megabytes.
#
# Environment: BUILD, MAKE, MPIRUN, CUDA (1: with the cuda backend), MARCH (x86-64-v3).
set -eu
cd "$(dirname "$0")/.."

build=${BUILD:-build}
make=${MAKE:-make}
objects=$build/bundle/objects
version=$(sed -n 's/.*MD_VERSION "\(.*\)"/\1/p' src/base.h)
root=$build/bundle/md_hpc-$version
programs=(md_hpc tests/ops/test_ops tests/ops/test_backend tests/unit/test_scalar_math
    tests/unit/test_golden_numerics tests/unit/test_golden_student tests/unit/test_golden_teacher)
# Of the C library, and of the driver and toolkit of the other machine.
system='^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|nsl))\.so'
nvidia='^lib(cuda|cudart|cublas|cublasLt|nccl|nvrtc|nvJitLink|nvToolsExt|nvidia-.*)\.so'

fail() {
    echo "bundle: $*" >&2
    exit 1
}

compile() {
    $make --no-print-directory BUILD="$objects" MARCH="${MARCH:-x86-64-v3}" CUDA="${CUDA:-1}" \
        "${programs[@]/#/$objects/}"
}

needed() { # FILE...: "soname path" of every library below them
    local lost
    ldd "$@" >"$root/ldd"
    lost=$(awk '/not found/ { print $1 }' "$root/ldd" | grep -vE "$nvidia" | sort -u | tr '\n' ' ' || true)
    [ -z "$lost" ] || fail "not found here: $lost"
    awk '$2 == "=>" && ($3 ~ /^\// || /not found/) { print $1, $3 }' "$root/ldd" | sort -u
    rm "$root/ldd"
}

libraries() { # FILE...: copies what they need, and notes what the other machine must have
    local name path
    while read -r name path; do
        if [[ $name =~ $nvidia ]]; then
            echo "$name" >>"$root/lib/host-libraries"
        elif [[ ! $name =~ $system ]]; then
            [ -e "$root/lib/$name" ] || cp -L "$path" "$root/lib/$name"
        fi
    done < <(needed "$@")
    [ ! -e "$root/lib/host-libraries" ] ||
        sort -u -o "$root/lib/host-libraries" "$root/lib/host-libraries"
}

# Plug-ins for one machine: those for other networks, queues and OpenSHMEM have libraries of their own.
open_mpi() {
    local plugins share etc plugin
    plugins=$(ompi_info --path pkglibdir | sed 's/.*: *//')
    share=$(ompi_info --path pkgdatadir | sed 's/.*: *//')
    etc=$(ompi_info --path sysconfdir | sed 's/.*: *//')
    mkdir -p "$root/lib/openmpi" "$root/share/openmpi" "$root/etc"
    for plugin in "$plugins"/mca_*.so; do
        [[ $plugin =~ (ucx|ofi|openib|psm|rdma|portals|flux|slurm|gridengine|monitoring|jsm|spml|scoll|sshmem|memheap)[^/]*$ ]] ||
            cp -L "$plugin" "$root/lib/openmpi/"
    done
    cp "$share"/help-*.txt "$root/share/openmpi/"
    cp "$etc"/openmpi-mca-params.conf "$root/etc/"
    cp -L "$(command -v orterun)" "$root/libexec/orterun"
    cp -L "$(command -v orted)" "$root/libexec/orted" # a program started without mpirun starts it
    wrapper bin/mpirun orterun
    wrapper bin/orted orted
    libraries "$root/libexec/orterun" "$root/libexec/orted" "$root"/lib/openmpi/*.so
}

# wrapper PATH PROGRAM: a script that runs it with the bundle's libraries.
wrapper() {
    local up
    up=$(dirname "$1" | sed 's|[^/][^/]*|..|g')
    mkdir -p "$root/$(dirname "$1")"
    # shellcheck disable=SC2016 # the script expands them
    printf '#!/bin/bash\nroot=$(cd "$(dirname "${BASH_SOURCE[0]}")/%s" && pwd)\nexec "$root/bin/with_libs" "$root/libexec/%s" "$@"\n' \
        "$up" "$2" >"$root/$1"
    chmod 755 "$root/$1"
}

copy_programs() {
    local program
    for program in "${programs[@]}"; do
        strip -g -o "$root/libexec/$(basename "$program")" "$objects/$program"
        wrapper "build/$program" "$(basename "$program")"
    done
    wrapper bin/md_hpc md_hpc
    libraries "$root"/libexec/*
}

# The tree as the scripts know it. The pictures of the training tests are the text of any files.
copy_tree() {
    local file
    for file in tests/golden/*.safetensors tests/golden/clip_hf tests/golden/golden_values.py \
        tests/env.sh tests/tiny_run.sh tests/gpu scripts/mpi_env.sh bench/bench_gpu.* config \
        docs/GPU.md README.md LICENSE; do
        mkdir -p "$root/$(dirname "$file")"
        cp -r "$file" "$root/$(dirname "$file")/"
    done
    mkdir -p "$root/src" "$root/io"
    cp src/base.c "$root/src/"
    cp io/decode.c "$root/io/"
    install -m 755 scripts/bundle/with_libs.sh "$root/bin/with_libs"
    install -m 644 scripts/bundle/env.sh "$root/env.sh"
    install -m 755 scripts/bundle/gpu_test.sh "$root/gpu-test.sh"
    install -m 755 scripts/bundle/gpu_bench.sh "$root/gpu-bench.sh"
}

newest_glibc() {
    objdump -T "$root"/libexec/* "$root"/lib/*.so* 2>/dev/null | grep -o 'GLIBC_[0-9][0-9.]*' |
        sort -uV | tail -n 1
}

command -v orterun >/dev/null || fail 'it knows Open MPI 4 only, and there is no orterun here'
rm -rf "$root" "$root.tar.gz"
mkdir -p "$root/bin" "$root/lib" "$root/libexec"
compile
copy_tree
copy_programs
open_mpi
tar -C "$build/bundle" -czf "$root.tar.gz" "md_hpc-$version"
echo "bundle: $root, $(du -sm "$root" | cut -f1) MiB, packed $(du -m "$root.tar.gz" | cut -f1) MiB"
echo "bundle: needs a C library with $(newest_glibc)"
[ ! -e "$root/lib/host-libraries" ] ||
    echo "bundle: needs of NVIDIA: $(tr '\n' ' ' <"$root/lib/host-libraries")and a driver"
