#!/bin/bash
# Looks whether everything the build needs is there: one line each with its version, and the one
# command that installs what is missing. Called by make with CC, MPICC, PROBE_CFLAGS, PROBE_LIBS and
# ONEDNN in the environment; the argument is the folder for probe.log.
set -u
dir=${1:?folder for probe.log}
mkdir -p "$dir"
log=$dir/probe.log
exe=$dir/probe.exe
: >"$log"
missing=() # Debian packages

found() {
    printf '  %-10s %s\n' "$1" "$2"
}

lost() { # NAME WHAT PACKAGE...
    found "$1" "$2"
    shift 2
    missing+=("$@")
}

# try NAME PACKAGE LIBS: the program on stdin prints a version.
try() {
    local out
    echo "== $1" >>"$log"
    # shellcheck disable=SC2086 # lists of flags
    if $PROBE_CC -w -x c - -x none -o "$exe" $3 >>"$log" 2>&1 && out=$("$exe" 2>>"$log"); then
        found "$1" "$out"
    else
        lost "$1" "missing (Debian: $2)" "$2"
    fi
    rm -f "$exe"
}

# header NAME PACKAGE HEADER FORMAT ARGUMENTS [LINE BEFORE THE INCLUDE [LINE AFTER IT]]
header() {
    try "$1" "$2" '' < <(printf '#include <stdio.h>\n%s\n#include <%s>\n%s\n' "${6:-}" "$3" "${7:-}"
        printf 'int main(void) { printf("%s", %s); return 0; }\n' "$4" "$5")
}

headers() {
    header MPI libopenmpi-dev mpi.h 'standard %d.%d' 'MPI_VERSION, MPI_SUBVERSION'
    header HDF5 libhdf5-openmpi-dev hdf5.h '%s, parallel' 'H5_VERS_INFO' '' \
        '_Static_assert(H5_HAVE_PARALLEL, "this HDF5 was built without MPI");'
    header libconfig libconfig-dev libconfig.h '%d.%d' 'LIBCONFIG_VER_MAJOR, LIBCONFIG_VER_MINOR'
    header JPEG libjpeg62-turbo-dev jpeglib.h 'API %d' JPEG_LIB_VERSION
    header PNG libpng-dev png.h '%s' PNG_LIBPNG_VER_STRING
    header jansson libjansson-dev jansson.h '%s' JANSSON_VERSION
    header xxHash libxxhash-dev xxhash.h '%d.%d' 'XXH_VERSION_MAJOR, XXH_VERSION_MINOR' \
        '#define XXH_INLINE_ALL'
    header zlib zlib1g-dev zlib.h '%s' ZLIB_VERSION
    if [ "$ONEDNN" = 1 ]; then
        header oneDNN libdnnl-dev dnnl.h '%d.%d' 'DNNL_VERSION_MAJOR, DNNL_VERSION_MINOR'
    else
        header CBLAS libdnnl-dev cblas.h '%s' '"any (oneDNN 2.x was not found, and is faster)"'
    fi
}

echo 'checking what the build needs:'
if ! command -v "$CC" >/dev/null; then
    lost compiler "missing: $CC" gcc libc6-dev
else
    found compiler "$("$CC" --version | head -n 1)"
fi
command -v "${PKG_CONFIG:-pkg-config}" >/dev/null || lost pkg-config missing pkg-config
command -v "$MPICC" >/dev/null || lost mpicc "missing: $MPICC" openmpi-bin
command -v "$CC" >/dev/null && headers

if [ ${#missing[@]} = 0 ]; then
    try together build-essential "$PROBE_LIBS" < <(echo '#include <stdio.h>'
        echo 'int main(void) { puts("all link"); return 0; }')
fi
if [ ${#missing[@]} -gt 0 ]; then
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    echo
    echo 'On Debian and Ubuntu this installs what is missing (or: make deps):'
    echo "  apt-get install ${missing[*]}"
    echo 'Elsewhere say where the libraries are: make MPI_HOME=... HDF5_HOME=... (INSTALL.md).'
    echo "What the compiler said is in $log."
    exit 1
fi
