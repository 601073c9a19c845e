# md_hpc
#
#   make                     build ./md_hpc            make test    build and run every test
#   make demo                the two-minute tour       make lint    layers, tokens, style, scripts
#   make deps                install what is missing   make info    what this build would use
#   make install PREFIX=     and uninstall             make clean
#
# Variables, on the command line or in the environment:
#   MPI_HOME HDF5_HOME LIBCONFIG_HOME JPEG_HOME PNG_HOME JANSSON_HOME XXHASH_HOME ZLIB_HOME DNNL_HOME
#   OPENBLAS_HOME CMOCKA_HOME   prefixes of libraries that pkg-config does not find (modules, Spack)
#   MARCH=native             CPU to build for, the build machine's by default; MARCH= for any
#   BUILD=build V=1          build folder; show whole commands
#   SAN=address,undefined    sanitizer build, in its own folder
#   CUDA=1                   the cuda backend, with nvcc, cuBLASLt and NCCL from CUDA_HOME (and
#                            NCCL_HOME); by default where there is an nvcc. CUDA=0: without.
#                            NCCL=0: ranks on GPUs talk through MPI only
#   DEPS=0                   `make test` and `make demo` do not look at Debian packages
#   PREFIX=/usr/local DESTDIR=
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif

empty :=
space := $(empty) $(empty)
comma := ,
squeeze = $(subst $(space),,$(1))

SAN    ?=
BUILD  ?= build$(if $(SAN),-$(subst $(comma),-,$(SAN)))
PREFIX ?= /usr/local
MARCH  ?= native
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(firstword $(wildcard $(shell command -v nvcc) \
    /usr/local/cuda/bin/nvcc)))
NVCC   ?= $(CUDA_HOME)/bin/nvcc
CUDA   ?= $(if $(wildcard $(NVCC)),1,0)

# ---- compiler and flags ----

MPICC      ?= $(if $(MPI_HOME),$(MPI_HOME)/bin/)mpicc
MPIRUN     ?= $(if $(MPI_HOME),$(MPI_HOME)/bin/)mpirun
PKG_CONFIG ?= pkg-config
OPT        ?= $(if $(SAN),-O1,-O3) $(if $(MARCH),-march=$(MARCH)) -fno-math-errno -fno-trapping-math
CFLAGS     ?= -g
CSTD       := -std=c11 -D_GNU_SOURCE
WARN       := -Wall -Wextra -Wshadow -Wconversion -Wno-missing-field-initializers -Wno-psabi
SANFLAGS   := $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined)

# ---- libraries: NAME_HOME, else pkg-config, else the compiler's own search path ----

home_cflags = $(or $(addprefix -I,$(wildcard $(1)/include)),$(if $(1),$(error there is no folder $(1)/include)))
home_libs   = $(foreach d,$(wildcard $(1)/lib $(1)/lib64),-L$(d) -Wl,-rpath,$(d)) $(2)
# $(call dep_cflags,HOME,pkg-config names) and $(call dep_libs,HOME,pkg-config names,-lname): the
# first pkg-config name that is installed counts.
dep_pkg    = $(firstword $(foreach p,$(1),$(shell $(PKG_CONFIG) --exists $(p) 2>/dev/null && echo $(p))))
dep_cflags = $(if $(1),$(call home_cflags,$(1)),$(if $(2),$(shell $(PKG_CONFIG) --cflags $(2) 2>/dev/null)))
dep_libs   = $(if $(1),$(call home_libs,$(1),$(3)),$(or $(if $(2),$(shell $(PKG_CONFIG) --libs $(2) 2>/dev/null)),$(3)))

# oneDNN 2.x where it is there, any CBLAS otherwise.
ONEDNN ?= $(shell printf '\#include <dnnl.h>\n\#if DNNL_VERSION_MAJOR != 2\n\#error\n\#endif\n' | \
    $(CC) $(call home_cflags,$(DNNL_HOME)) -E - >/dev/null 2>&1 && echo 1 || echo 0)
ifeq ($(ONEDNN),1)
BLAS_CFLAGS := -DMD_ONEDNN=1 $(call dep_cflags,$(DNNL_HOME))
BLAS_LIBS   := $(call dep_libs,$(DNNL_HOME),,-ldnnl)
else
BLAS_CFLAGS := -DMD_ONEDNN=0 $(call dep_cflags,$(OPENBLAS_HOME),openblas)
BLAS_LIBS   := $(call dep_libs,$(OPENBLAS_HOME),openblas,-lopenblas)
endif

MPI_SHOW := $(shell $(MPICC) -show 2>/dev/null)
HDF5_PKG := $(call dep_pkg,$(if $(findstring mpich,$(MPI_SHOW)),hdf5-mpich) hdf5-openmpi hdf5-mpi hdf5)

DEP_CFLAGS := $(filter -I% -D% -pthread,$(MPI_SHOW)) \
    $(call dep_cflags,$(HDF5_HOME),$(HDF5_PKG)) \
    $(call dep_cflags,$(LIBCONFIG_HOME),libconfig) \
    $(call dep_cflags,$(JPEG_HOME),libjpeg) \
    $(call dep_cflags,$(PNG_HOME),libpng) \
    $(call dep_cflags,$(JANSSON_HOME),jansson) \
    $(call dep_cflags,$(XXHASH_HOME),libxxhash) \
    $(call dep_cflags,$(ZLIB_HOME),zlib) \
    $(BLAS_CFLAGS)
DEP_LIBS := $(call dep_libs,$(HDF5_HOME),$(HDF5_PKG),-lhdf5) \
    $(filter -L% -l% -Wl$(comma)% -pthread,$(MPI_SHOW)) \
    $(call dep_libs,$(LIBCONFIG_HOME),libconfig,-lconfig) \
    $(call dep_libs,$(JPEG_HOME),libjpeg,-ljpeg) \
    $(call dep_libs,$(PNG_HOME),libpng,-lpng) \
    $(call dep_libs,$(JANSSON_HOME),jansson,-ljansson) \
    $(call dep_libs,$(ZLIB_HOME),zlib,-lz) \
    $(BLAS_LIBS) -lm -lpthread
TEST_CFLAGS := $(call dep_cflags,$(CMOCKA_HOME),cmocka)
TEST_LIBS   := $(call dep_libs,$(CMOCKA_HOME),cmocka,-lcmocka)

# The cuda backend is compiled twice: by nvcc for GPUs, and by the C++ compiler with a stand-in for
# CUDA (tests/emu), on which the tests run it. Either is linked with the same library.
CXX        ?= g++
CUDA_ARCH  ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
    -gencode arch=compute_90,code=compute_90
NVCC_FLAGS := -std=c++17 -O3 $(CUDA_ARCH) -Xptxas -v -Xcompiler -Wall,-Wextra,-Wno-missing-field-initializers \
    $(if $(SAN),-g)
CUDA_LIB   := $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib)
NCCL       ?= $(if $(wildcard $(addsuffix /include/nccl.h,$(NCCL_HOME) $(CUDA_HOME) /usr/local /usr)),1,0)
CUDA_LIBS  := $(foreach d,$(CUDA_LIB) $(wildcard $(NCCL_HOME)/lib),-L$(d) -Wl,-rpath,$(d)) \
    -lcublasLt $(if $(filter 1,$(NCCL)),-lnccl) -lcudart_static -lrt -ldl -lstdc++
CUDA_CFLAGS := $(foreach d,$(NCCL_HOME) $(CUDA_HOME),-isystem $(d)/include)
EMU_FLAGS  := -std=c++17 -D_GNU_SOURCE -DMD_EMU -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX -I. -Itests/emu/include -g $(if $(SAN),-O1,-O2) -Wall -Wextra \
    -Wno-missing-field-initializers -Wno-unknown-pragmas $(SANFLAGS)

CFLAGS_ALL := $(strip $(CSTD) $(WARN) $(OPT) -fopenmp -pthread $(CFLAGS) $(SANFLAGS))
EXTRA      := # of single files, by target
COMPILE    := $(CC) -I. $(strip $(DEP_CFLAGS)) $(CPPFLAGS) $(CFLAGS_ALL)
SANOBJ     := $(if $(SAN),$(BUILD)/tests/san/keep_modules.o)
LIBS_ALL   := $(LDFLAGS) $(strip $(DEP_LIBS))

# ---- files ----

SRC  := $(filter-out mpi/comm_nccl.c,$(wildcard src/*.c kernels/*.c kernels/*/*.c mpi/*.c io/*.c))
OBJ  := $(SRC:%.c=$(BUILD)/%.o)
LIB  := $(BUILD)/libmd_hpc.a
PROG := $(BUILD)/md_hpc
TEST_SRC  := $(wildcard tests/unit/test_*.c tests/ops/test_*.c tests/par/test_*.c)
TESTS     := $(TEST_SRC:%.c=$(BUILD)/%)
# The op tests are one program of several files.
OPS_OBJ   := $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(TEST_SRC),$(wildcard tests/ops/*.c)))
CUDA_SRC  := $(wildcard kernels/cuda/*.cu)
CUDA_OBJ  := $(CUDA_SRC:%.cu=$(BUILD)/cuda/%.o) $(if $(filter 1,$(NCCL)),$(BUILD)/cuda/mpi/comm_nccl.o)
EMU_SRC   := $(filter-out tests/emu/test_%,$(wildcard tests/emu/*.cpp))
EMU_OBJ   := $(CUDA_SRC:%.cu=$(BUILD)/emu/%.o) $(EMU_SRC:%.cpp=$(BUILD)/emu/%.o) \
    $(BUILD)/emu/mpi/comm_nccl.o
EMU_PROGS := $(addprefix $(BUILD)/emu/,md_hpc test_ops test_emu)
BENCH_SRC := $(wildcard bench/*.c)
BENCHES   := $(BENCH_SRC:%.c=$(BUILD)/%)

# ---- rules ----

ifeq ($(V),1)
Q :=
say := @:
else
Q := @
say := @$(if $(findstring s,$(filter-out --%,$(firstword -$(MAKEFLAGS)))),:,printf '  %-5s %s\n')
endif

.PHONY: all tests benches test bench-cpu bench-parallel bench-loader bench-checkpoint bench-memory \
        bundle gpu-test gpu-bench lint format demo miniature deps info install uninstall clean FORCE

all: $(PROG)
	@cmp -s $(PROG) md_hpc || cp -f $(PROG) md_hpc

tests: $(TESTS) $(EMU_PROGS)
	@:
benches: $(BENCHES)
	@:

# Everything is rebuilt when the compiler or a flag changes, and nothing when none does. The new
# set is probed first: one line a library, and the way to get the missing ones.
PROBE = CC='$(CC)' MPICC='$(MPICC)' PKG_CONFIG='$(PKG_CONFIG)' ONEDNN='$(ONEDNN)' \
    PROBE_CC='$(COMPILE)' PROBE_LIBS='$(LIBS_ALL)' scripts/probe.sh $(BUILD)
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@printf '%s\n' '$(COMPILE)' '$(LIBS_ALL)' '$(TEST_CFLAGS) $(TEST_LIBS)' '$(CXX) $(EMU_FLAGS)' \
	    '$(if $(filter 1,$(CUDA)),$(NVCC) $(NVCC_FLAGS) $(CUDA_LIBS))' > $@.new
	@cmp -s $@.new $@ && rm -f $@.new || { \
	    $(PROBE) && mv $@.new $@; }

# What the binary was made of; rewritten only when it changed, so that nothing is rebuilt in vain.
BUILD_SOURCE := $(shell git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
$(BUILD)/build_stamp.h: FORCE
	@mkdir -p $(@D)
	@printf '#define MD_BUILD_SOURCE "%s"\n#define MD_BUILD_FLAGS "%s"\n' \
	    '$(BUILD_SOURCE)' '$(CFLAGS_ALL)' > $@.new
	@cmp -s $@.new $@ && rm -f $@.new || mv $@.new $@
$(BUILD)/src/log.o: $(BUILD)/build_stamp.h
$(BUILD)/src/log.o: private EXTRA += -I$(BUILD)

# Fused multiply-adds where tolerances hold; elsewhere (pictures, schedules) bits must not depend on
# the processor, and C11 mode keeps products unfused.
$(BUILD)/kernels/cpu/%.o: private EXTRA += -ffp-contract=fast
$(BUILD)/kernels/cpu/cpu_patch.o: private EXTRA := -ffp-contract=off

$(BUILD)/%.o: %.c $(BUILD)/flags
	$(say) CC $<
	@mkdir -p $(@D)
	$(Q)$(COMPILE) $(EXTRA) -MMD -MP -c $< -o $@

$(LIB): $(filter-out $(BUILD)/src/main.o,$(OBJ))
	$(say) AR $@
	@rm -f $@
	$(Q)$(AR) rcs $@ $^

$(PROG): $(BUILD)/src/main.o $(if $(filter 1,$(CUDA)),$(CUDA_OBJ)) $(LIB) $(SANOBJ)
	$(say) LINK $@
	$(Q)$(CC) $(CFLAGS_ALL) -rdynamic $^ -o $@ $(LIBS_ALL) \
	    $(if $(filter 1,$(CUDA)),$(CUDA_LIBS)) # the watchdog's stacks have names

$(BUILD)/cuda/%.o: %.cu $(BUILD)/flags
	$(say) NVCC $<
	@mkdir -p $(@D)
	$(Q)$(NVCC) $(NVCC_FLAGS) -I. -MMD -MP -MF $(@:.o=.d) -c $< -o $@ >$(@:.o=.log) 2>&1; rc=$$?; \
	    grep -vE '^ptxas info|^ *[0-9]+ bytes (stack|gmem)|^$$' $(@:.o=.log); exit $$rc
$(BUILD)/cuda/%.o: %.c $(BUILD)/flags
	$(say) CC $<
	@mkdir -p $(@D)
	$(Q)$(COMPILE) $(CUDA_CFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/emu/%.o: %.cu $(BUILD)/flags
	$(say) CXX $<
	@mkdir -p $(@D)
	$(Q)$(CXX) -x c++ $(EMU_FLAGS) -MMD -MP -c $< -o $@
$(BUILD)/emu/%.o: %.cpp $(BUILD)/flags
	$(say) CXX $<
	@mkdir -p $(@D)
	$(Q)$(CXX) $(strip $(DEP_CFLAGS)) $(EMU_FLAGS) -MMD -MP -c $< -o $@
$(BUILD)/emu/%.o: %.c $(BUILD)/flags
	$(say) CC $<
	@mkdir -p $(@D)
	$(Q)$(COMPILE) -Itests/emu/include -MMD -MP -c $< -o $@
EMU_LINK = $(Q)$(CC) $(CFLAGS_ALL) -rdynamic $^ -o $@ $(LIBS_ALL) $(TEST_LIBS) -lstdc++
$(BUILD)/emu/md_hpc: $(BUILD)/src/main.o $(EMU_OBJ) $(LIB) $(SANOBJ)
	$(say) LINK $@
	$(EMU_LINK)
$(BUILD)/emu/test_ops: $(BUILD)/tests/ops/test_ops.o $(OPS_OBJ) $(EMU_OBJ) $(LIB) $(SANOBJ)
	$(say) LINK $@
	$(EMU_LINK)
$(BUILD)/emu/test_emu: $(BUILD)/emu/tests/emu/test_emu.o $(EMU_OBJ) $(LIB) $(SANOBJ)
	$(say) LINK $@
	$(EMU_LINK)

$(BUILD)/tests/%: tests/%.c $(LIB) $(SANOBJ)
	$(say) TEST $<
	@mkdir -p $(@D)
	$(Q)$(COMPILE) $(TEST_CFLAGS) -MMD -MP $< $(TEST_OBJ) $(LIB) $(SANOBJ) -o $@ $(TEST_LIBS) $(LIBS_ALL)
OPS_ALL := $(OPS_OBJ) $(if $(filter 1,$(CUDA)),$(CUDA_OBJ))
$(BUILD)/tests/ops/test_ops: $(OPS_ALL)
$(BUILD)/tests/ops/test_ops: private TEST_OBJ := $(OPS_ALL)
$(BUILD)/tests/ops/test_ops: private TEST_LIBS += $(if $(filter 1,$(CUDA)),$(CUDA_LIBS))
FAKE_DEVICE := $(BUILD)/tests/ops/fake_device.o
$(BUILD)/tests/par/test_comm_device: $(FAKE_DEVICE)
$(BUILD)/tests/par/test_comm_device: private TEST_OBJ := $(FAKE_DEVICE)

$(BUILD)/bench/%: bench/%.c $(LIB)
	$(say) BENCH $<
	@mkdir -p $(@D)
	$(Q)$(COMPILE) -MMD -MP $< $(LIB) -o $@ $(LIBS_ALL)

-include $(EMU_OBJ:.o=.d) $(BUILD)/emu/tests/emu/test_emu.d $(CUDA_OBJ:.o=.d) $(OBJ:.o=.d) $(OPS_OBJ:.o=.d) $(TESTS:=.d) $(BENCHES:=.d)

# ---- people's targets ----

# Debian packages are looked at unless libraries were named by hand.
HOMES := $(MPI_HOME)$(HDF5_HOME)$(LIBCONFIG_HOME)$(JPEG_HOME)$(PNG_HOME)$(JANSSON_HOME)$(XXHASH_HOME)
HOMES := $(HOMES)$(ZLIB_HOME)$(DNNL_HOME)$(OPENBLAS_HOME)$(CMOCKA_HOME)
DEPS  ?= $(if $(call squeeze,$(HOMES)),0,1)
need_deps = $(if $(filter 1,$(DEPS)),scripts/deps.sh $(1) || exit 1;)

deps:
	@scripts/deps.sh build test demo lint

# Recursive, because flags are known only after the packages are there.
test:
	@$(call need_deps,build test) $(MAKE) --no-print-directory all tests
	@MAKE='$(MAKE)' BUILD='$(BUILD)' SAN='$(SAN)' MPIRUN='$(MPIRUN)' tests/run.sh $(TESTS_ONLY)

demo:
	@$(call need_deps,build demo) $(MAKE) --no-print-directory all
	@BUILD='$(BUILD)' MPIRUN='$(MPIRUN)' scripts/demo.sh

# The paper's tables in small; see the head of the script.
miniature:
	@$(call need_deps,build demo) $(MAKE) --no-print-directory all
	@BUILD='$(BUILD)' MPIRUN='$(MPIRUN)' scripts/miniature.sh

# Whole training steps against PyTorch; CASES="vit_b16 small".
bench-cpu:
	@$(call need_deps,build) $(MAKE) --no-print-directory all
	@BUILD='$(BUILD)' bench/bench_cpu.sh $(CASES)

# Ranks against threads, and what ranks send; CASES=small, RANKS=2.
bench-parallel:
	@$(call need_deps,build) $(MAKE) --no-print-directory all
	@BUILD='$(BUILD)' MPIRUN='$(MPIRUN)' bench/bench_parallel.sh $(CASES)

# Loader stages and reads against a bare pread loop: PHOTOS="store.h5" or JPEG files.
bench-loader: $(BUILD)/bench/bench_loader
	$< $(PHOTOS)

# Checkpoint writes against plain parallel writes and fsync of the same bytes, in DIR.
bench-checkpoint: $(BUILD)/bench/bench_checkpoint
	. tests/env.sh && $(MPIRUN) -np 2 $< $(or $(DIR),.) 5

# Peak memory as `plan` predicts it against short runs.
bench-memory:
	@$(call need_deps,build demo) $(MAKE) --no-print-directory all
	@BUILD='$(BUILD)' MPIRUN='$(MPIRUN)' OMP_NUM_THREADS=1 bench/bench_memory.sh

# A folder with program, tests and libraries for another machine, as docs/GPU.md says.
bundle:
	@MAKE='$(MAKE)' BUILD='$(BUILD)' CUDA='$(if $(filter file,$(origin CUDA)),1,$(CUDA))' scripts/bundle.sh

# On a machine with a GPU, a build with CUDA; ONLY="ops NCCL", PARTS="limits ours peer".
gpu-test:
	@$(call need_deps,build test) $(MAKE) --no-print-directory all tests
	@BUILD='$(BUILD)' MPIRUN='$(MPIRUN)' tests/gpu/gpu_test.sh $(ONLY)

gpu-bench:
	@$(call need_deps,build) $(MAKE) --no-print-directory all
	@BUILD='$(BUILD)' bench/bench_gpu.sh $(PARTS)

lint:
	@tests/lint/run.sh

# Every C file as clang-format writes it.
format:
	clang-format-14 -i $$(git ls-files '*.[ch]' '*.cu' '*.cuh' '*.cpp' | grep -v '^tests/golden/')

info:
	@printf '%-10s %s\n' compiler '$(CC): $(shell $(CC) --version 2>/dev/null | head -n 1)' \
	    flags '$(CFLAGS_ALL)' includes '$(strip $(DEP_CFLAGS))' libraries '$(LIBS_ALL)' \
	    source '$(BUILD_SOURCE)' folder '$(BUILD)' prefix '$(DESTDIR)$(PREFIX)'
	@$(PROBE)

SHARE := $(DESTDIR)$(PREFIX)/share/md_hpc
DOC   := $(DESTDIR)$(PREFIX)/share/doc/md_hpc
install: all
	install -D -m 755 $(PROG) $(DESTDIR)$(PREFIX)/bin/md_hpc
	set -e; for f in $$(find config -type f | sort); do install -D -m 644 $$f $(SHARE)/$$f; done
	set -e; for f in $$(find jobscripts -type f | sort); do install -D -m 644 $$f $(SHARE)/$$f; done
	install -D -m 644 -t $(DOC) README.md INSTALL.md LICENSE

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/md_hpc
	rm -rf $(SHARE) $(DOC)

clean:
	rm -rf $(BUILD) md_hpc
