#!/bin/bash
# What the assembler made of the kernels, for sm_80 and sm_90: no kernel spills registers, and none
# takes more registers, stack or static shared memory than the table tests/cuda/ptxas.txt says. How
# many blocks run at once on a multiprocessor depends on these numbers, and so does speed.
#
#   tests/cuda/ptxas.sh [--update]        compares, or writes the table anew
#
# Another version of nvcc than the table's allocates otherwise: then only spills count.
# Environment: NVCC, NVCC_ARCHS ("80 90"); PTXAS_LOGS, a folder where the build left what nvcc said of
# each file (BUILD/cuda/kernels/cuda), else they are compiled here. Exit status 77: there is no nvcc.
set -u
cd "$(dirname "$0")/../.." || exit 1
nvcc=${NVCC:-$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")}
table=tests/cuda/ptxas.txt
read -ra archs <<<"${NVCC_ARCHS:-80 90}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

command -v "$nvcc" >/dev/null || { echo 'nvcc is not installed' && exit 77; }
version=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
shopt -s nullglob
sources=(kernels/cuda/*.cu)
[ ${#sources[@]} -gt 0 ] || { echo 'there are no kernels' && exit 77; }

compile() { # FILE ARCH
    local log made
    log=$scratch/$(basename "$1").$2
    made=${PTXAS_LOGS:-}/$(basename "$1" .cu).log
    if [ -n "${PTXAS_LOGS:-}" ] && [ -e "$made" ]; then
        cp "$made" "$log.log"
        return
    fi
    "$nvcc" -std=c++17 -O3 -I. -gencode "arch=compute_$2,code=sm_$2" -Xptxas -v -c "$1" \
        -o "$log.o" >"$log.log" 2>&1 || { cat "$log.log" && touch "$scratch/failed"; }
    rm -f "$log.o"
}

# rows FILE ARCH: "sm registers stack smem spills file kernel" of a log.
rows() {
    awk -v file="$(basename "$1")" -v arch="sm_$2" '
        /Compiling entry function/ {
            split($0, part, "\047")
            kernel = part[4] == arch ? part[2] : ""
            stack = spills = 0
        }
        /bytes stack frame/ {
            for (i = 1; i < NF; i++) {
                if ($(i + 2) == "stack") stack = $i
                if ($(i + 2) == "spill") spills += $i
            }
        }
        /Used [0-9]+ registers/ && kernel != "" {
            smem = registers = 0
            for (i = 1; i < NF; i++) {
                if ($(i + 1) ~ /^registers/) registers = $i
                if ($(i + 2) ~ /^smem/) smem = $i
            }
            print arch, registers, stack, smem, spills, file, kernel
            kernel = ""
        }' "$scratch/$(basename "$1").$2.log" | c++filt | sed 's/(anonymous namespace):://g; s/void //'
}

compile_all() {
    local arch file
    for file in "${sources[@]}"; do
        for arch in "${archs[@]}"; do
            compile "$file" "$arch" &
            while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
        done
    done
    wait
    [ ! -e "$scratch/failed" ]
}

# The instances of a template that differ in types and constants only are one row, the largest.
all_rows() {
    local arch file
    for file in "${sources[@]}"; do
        for arch in "${archs[@]}"; do
            rows "$file" "$arch"
        done
    done | awk '
        {
            kernel = $0
            sub(/^[^ ]+ [^ ]+ [^ ]+ [^ ]+ [^ ]+ [^ ]+ /, "", kernel)
            match(kernel, /^[a-zA-Z_0-9]+(<[a-zA-Z_0-9]+<)?/)
            kernel = substr(kernel, 1, RLENGTH)
            sub(/<$/, "", kernel)
            k = $6 " " kernel " " $1
            if (!(k in n)) { n[k] = 0; what[k] = $6 " " kernel; arch[k] = $1 }
            n[k]++
            for (i = 2; i <= 5; i++) if ($i > most[k, i] + 0) most[k, i] = $i
        }
        END {
            for (k in n)
                print arch[k], most[k, 2] + 0, most[k, 3] + 0, most[k, 4] + 0, most[k, 5] + 0, what[k]
        }' | LC_ALL=C sort -k 6,7 -k 1,1
}

# The columns in front of a row's file and kernel, which name it.
compare() {
    local strict=1
    grep -q "^# nvcc $version\$" "$table" 2>/dev/null || strict=0
    [ $strict = 1 ] || echo "nvcc $version is not that of the table: only spills are compared"
    awk -v strict=$strict '
        function name(   s) { s = $0; sub(/^[^ ]+ [^ ]+ [^ ]+ [^ ]+ [^ ]+ /, "", s); return $1 " " s }
        function wrong(text) { print text; bad = 1 }
        /^#/ { next }
        FILENAME == ARGV[1] { known[name()] = $2 " " $3 " " $4; next }
        { n++; seen[name()] = 1 }
        $5 > 0 { wrong(name() ": spills " $5 " bytes") }
        !strict { next }
        !(name() in known) { wrong(name() ": not in the table"); next }
        {
            split(known[name()], limit)
            if ($2 > limit[1]) wrong(name() ": " $2 " registers, the table has " limit[1])
            if ($3 > limit[2]) wrong(name() ": " $3 " bytes of stack, the table has " limit[2])
            if ($4 > limit[3]) wrong(name() ": " $4 " bytes of shared memory, the table has " limit[3])
        }
        END {
            for (k in known) if (strict && !(k in seen)) wrong(k ": in the table, but no kernel")
            if (!bad) print n " kernels, as the table says"
            exit bad || !n
        }' "$table" "$scratch/rows"
}

compile_all || exit 1
all_rows >"$scratch/rows"
[ -s "$scratch/rows" ] || { echo 'no kernel was compiled' && exit 1; }
if [ "${1:-}" = --update ]; then
    {
        echo "# nvcc $version"
        echo '# arch registers stack smem spills file kernel; written by tests/cuda/ptxas.sh --update'
        cat "$scratch/rows"
    } >"$table"
    exit
fi
[ -e "$table" ] || { echo "there is no $table: tests/cuda/ptxas.sh --update" && exit 1; }
compare
