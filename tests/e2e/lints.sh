#!/bin/bash
# Every lint finds what it is there for: a small tree with one fault of each kind.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/tests" "$scratch/src" "$scratch/kernels" "$scratch/scripts"
cp -r tests/lint "$scratch/tests/lint"
cp .clang-format "$scratch"
cp kernels/backend.h "$scratch/kernels"
cd "$scratch"

word=$(printf "%s%s" TO DO)
blanks="   "
long=$(for i in $(seq 101); do echo "    x += $i;"; done)
cat >src/vit.c <<END
#include "mpi/comm.h"
#include <mpi.h>
int f(int a, int b, int c, int d, int e, int g, int h)
{
    char *p = malloc(1); /* malloc( in a comment is fine */
    if (strcmp(name, "beit") == 0)
        exit(1);
    MPI_Barrier(comm);
    const char *text = "assert( in a string is fine";$blanks
$long
    return  a; // ${word}
}
END
echo 'int x;' >src/nowhere.h
printf '#!/bin/bash\ncd %s\n' "\$1" >scripts/bad.sh
for name in bad.sbatch bad.pbs; do cp scripts/bad.sh "scripts/$name"; done

expect() { # LINT TEXT...
    local lint=$1 text rc=0
    shift
    bash "tests/lint/lint_$lint.sh" >out 2>&1 || rc=$?
    [ "$rc" != 77 ] || return 0
    [ "$rc" = 1 ] || { echo "lint_$lint: status $rc" && exit 1; }
    for text in "$@"; do
        grep -qF "$text" out || { echo "lint_$lint does not say: $text" && cat out && exit 1; }
    done
}
expect layers 'src/vit.c:1: layer 4 must not include mpi/comm.h' 'src/vit.c:2: <mpi.h>' \
    'src/nowhere.h:1: in no layer'
expect tokens 'src/vit.c:5: memory comes from md_alloc' 'src/vit.c:6: a method' \
    'src/vit.c:7: failures return' 'src/vit.c:8: MPI is called'
if grep -q 'vit.c:9\|MD_ASSERT' out; then
    echo 'lint_tokens reads strings or comments' && cat out && exit 1
fi
expect size 'src/vit.c:3: 7 parameters' 'src/vit.c:4: function of 10'
expect coverage 'op gemm has no case'
expect style 'src/vit.c'
expect shell 'scripts/bad.sh:2' 'scripts/bad.sbatch:2' 'scripts/bad.pbs:2'
expect text 'src/vit.c:9: trailing blank' 'unfinished'
expect headers 'src/vit.c:1: begins with no comment' 'src/nowhere.h:1: no include guard'
echo ok
