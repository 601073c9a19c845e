# Environment of the tests, sourced by tests/run.sh and usable by hand: . tests/env.sh
# shellcheck shell=bash
tests_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/mpi_env.sh
. "$tests_dir/../scripts/mpi_env.sh"

# Sanitizers: leaks inside MPI, HDF5 and their helpers are not ours.
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:${ASAN_OPTIONS:-}
export LSAN_OPTIONS=suppressions=$tests_dir/san/lsan.supp:print_suppressions=0:${LSAN_OPTIONS:-}
export UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS:-}
