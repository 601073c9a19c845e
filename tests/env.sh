# Environment of the tests, sourced by tests/run.sh and usable by hand: . tests/env.sh
# shellcheck shell=bash

# Open MPI on one machine, also in containers: more ranks than cores, root, no cross-memory attach,
# no network transports. Other MPIs ignore these.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader
export OMPI_MCA_btl_vader_single_copy_mechanism=none
# Report a failing rank's own message, not mpirun's page about it.
export OMPI_MCA_orte_base_help_aggregate=1
# Idle OpenMP threads sleep: ranks share the cores.
export OMP_WAIT_POLICY=passive

# Sanitizers: leaks inside MPI, HDF5 and their helpers are not ours.
san_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/san" && pwd)
export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0:${ASAN_OPTIONS:-}
export LSAN_OPTIONS=suppressions=$san_dir/lsan.supp:print_suppressions=0:${LSAN_OPTIONS:-}
export UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS:-}
