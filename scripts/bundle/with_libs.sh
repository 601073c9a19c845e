#!/bin/bash
# Runs a command with the libraries of this bundle and those of NVIDIA that env.sh finds.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/bundle/env.sh
[ -n "${MD_CUDA_LIBS+set}" ] || . "$root/env.sh"
export LD_LIBRARY_PATH=$root/lib${MD_CUDA_LIBS:+:$MD_CUDA_LIBS}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# Open MPI's folders were fixed when it was built; these move them all.
export OPAL_PREFIX=$root OPAL_BINDIR=$root/bin OPAL_LIBDIR=$root/lib
export OPAL_PKGLIBDIR=$root/lib/openmpi OPAL_PKGDATADIR=$root/share/openmpi OPAL_SYSCONFDIR=$root/etc
export PMIX_MCA_pcompress_base_silence_warning=1 # its plug-in that compresses is not here
exec "$@"
