# md_hpc: make [CUDA=0] [SAN=address,undefined] [BUILD=dir] [MPI_HOME= HDF5_HOME= LIBCONFIG_HOME=
# CUDA_HOME= NCCL_HOME=] ; make demo | test | bench-cpu | install PREFIX= DESTDIR=
.SUFFIXES:
.DEFAULT_GOAL := all

BUILD  ?= build$(if $(SAN),-san)
PREFIX ?= /usr/local
PKG    ?= pkg-config

MPICC  := $(if $(MPI_HOME),$(MPI_HOME)/bin/mpicc,mpicc)
CSTD   := -std=c11 -D_GNU_SOURCE
WARN   := -Wall -Wextra -Wshadow -Wconversion -Wno-missing-field-initializers
OPT    ?= -O3 -march=native -fno-math-errno -fno-trapping-math
CFLAGS ?= -g
SANFLAGS := $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined)

home_flags = $(if $(1),-I$(1)/include)
home_libs  = $(if $(1),-L$(1)/lib -Wl$(comma)-rpath$(comma)$(1)/lib)
comma := ,

HDF5_CFLAGS := $(if $(HDF5_HOME),$(call home_flags,$(HDF5_HOME)),$(shell $(PKG) --cflags hdf5-openmpi 2>/dev/null))
HDF5_LIBS   := $(if $(HDF5_HOME),$(call home_libs,$(HDF5_HOME)) -lhdf5,$(shell $(PKG) --libs hdf5-openmpi 2>/dev/null))
CONF_CFLAGS := $(call home_flags,$(LIBCONFIG_HOME))
CONF_LIBS   := $(call home_libs,$(LIBCONFIG_HOME)) -lconfig

# oneDNN 2.x where it is there, any CBLAS otherwise.
ONEDNN ?= $(shell printf '\#include <dnnl.h>\n\#if DNNL_VERSION_MAJOR != 2\n\#error\n\#endif\n' | $(CC) -E - >/dev/null 2>&1 && echo 1 || echo 0)
ifeq ($(ONEDNN),1)
BLAS_CFLAGS := -DMD_ONEDNN=1
BLAS_LIBS   := -ldnnl
else
BLAS_CFLAGS := -DMD_ONEDNN=0 $(shell $(PKG) --cflags openblas 2>/dev/null)
BLAS_LIBS   := $(or $(shell $(PKG) --libs openblas 2>/dev/null),-lopenblas)
endif

MPI_CFLAGS := $(shell $(MPICC) --showme:compile 2>/dev/null)
MPI_LIBS   := $(shell $(MPICC) --showme:link 2>/dev/null)

CPPFLAGS_ALL := -I. $(MPI_CFLAGS) $(HDF5_CFLAGS) $(CONF_CFLAGS) $(BLAS_CFLAGS) $(CPPFLAGS)
CFLAGS_ALL   := $(CSTD) $(WARN) $(OPT) -fopenmp -pthread $(CFLAGS) $(SANFLAGS)
LIBS_ALL     := $(HDF5_LIBS) $(MPI_LIBS) $(CONF_LIBS) $(BLAS_LIBS) -ljpeg -lpng -ljansson -lz -lm -lpthread

SRC  := $(wildcard src/*.c kernels/*.c kernels/*/*.c mpi/*.c io/*.c)
OBJ  := $(SRC:%.c=$(BUILD)/%.o)
LIB  := $(BUILD)/libmd_hpc.a
PROG := $(BUILD)/md_hpc
TEST_SRC := $(wildcard tests/unit/test_*.c tests/ops/test_*.c tests/par/test_*.c)
TESTS    := $(TEST_SRC:%.c=$(BUILD)/%)
BENCH_SRC := $(wildcard bench/*.c)
BENCHES   := $(BENCH_SRC:%.c=$(BUILD)/%)

.PHONY: all tests FORCE
all: $(PROG)
	@cp -f $(PROG) md_hpc 2>/dev/null || true

tests: $(TESTS)

# What the binary was made of; rewritten only when it changed, so that nothing is rebuilt in vain.
BUILD_SOURCE := $(shell git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
$(BUILD)/build_stamp.h: FORCE
	@mkdir -p $(@D)
	@printf '#define MD_BUILD_SOURCE "%s"\n#define MD_BUILD_FLAGS "%s"\n' \
	    '$(BUILD_SOURCE)' '$(OPT) $(CFLAGS) $(SANFLAGS)' > $@.new
	@cmp -s $@.new $@ && rm -f $@.new || mv $@.new $@
$(BUILD)/src/log.o: $(BUILD)/build_stamp.h
$(BUILD)/src/log.o: CPPFLAGS_ALL += -I$(BUILD)

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -MMD -MP -c $< -o $@

$(LIB): $(filter-out $(BUILD)/src/main.o,$(OBJ))
	@rm -f $@
	$(AR) rcs $@ $^

$(PROG): $(BUILD)/src/main.o $(LIB)
	$(CC) $(CFLAGS_ALL) $(LDFLAGS) $^ -o $@ $(LIBS_ALL)

$(BUILD)/tests/%: tests/%.c $(LIB)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -MMD -MP $< $(LIB) -o $@ $(LDFLAGS) -lcmocka $(LIBS_ALL)

$(BUILD)/bench/%: bench/%.c $(LIB)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -MMD -MP $< $(LIB) -o $@ $(LDFLAGS) $(LIBS_ALL)

-include $(OBJ:.o=.d) $(TESTS:=.d) $(BENCHES:=.d)
