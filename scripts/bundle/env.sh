# Finds what this bundle takes from the machine: . env.sh sets MD_CUDA_LIBS, the folders with the
# libraries of NVIDIA named in lib/host-libraries, and puts bin/ in front of PATH. LD_LIBRARY_PATH
# stays as it is: only the programs of the bundle get theirs (bin/with_libs), Python does not.
# shellcheck shell=bash
bundle_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Folders that may hold them: the toolkit, then the packages that come with PyTorch.
bundle_folders() {
    tr ':' '\n' <<<"${LD_LIBRARY_PATH:-}"
    printf '%s\n' ${CUDA_HOME:+"$CUDA_HOME"/lib64} /usr/local/cuda/lib64 /usr/local/cuda-*/lib64 \
        /usr/local/cuda-*/targets/x86_64-linux/lib /usr/lib/x86_64-linux-gnu
    local python=${MD_BENCH_PYTHON:-python3}
    "$python" -c 'import glob, site, sys
for p in site.getsitepackages() + [site.getusersitepackages()] + sys.path:
    print("\n".join(sorted(glob.glob(p + "/nvidia/*/lib"))))' 2>/dev/null
}

bundle_find() {
    local name folder found=:
    mapfile -t folders < <(bundle_folders | grep . | awk '!seen[$0]++')
    while read -r name; do
        [[ $name != libcuda.so* ]] || continue # the driver's, found by the system
        for folder in "${folders[@]}"; do
            [ -e "$folder/$name" ] || continue
            [[ $found == *":$folder:"* ]] || found=$found$folder:
            continue 2
        done
        echo "env.sh: $name is nowhere: install a CUDA toolkit or its Python package" >&2
    done < <(cat "$bundle_root/lib/host-libraries" 2>/dev/null)
    found=${found#:}
    export MD_CUDA_LIBS=${found%:}
}

bundle_find
export PATH=$bundle_root/bin:$PATH
