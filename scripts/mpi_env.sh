# Open MPI on one machine, also in containers: more ranks than cores, root, no cross-memory attach, no
# network transports, no page about a rank that has already said what is wrong. Other MPIs ignore
# these. Sourced by the tests and the demo, never meant for a cluster.
# shellcheck shell=bash
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_orte_execute_quiet=1
# Idle OpenMP threads sleep: ranks share the cores.
export OMP_WAIT_POLICY=passive
