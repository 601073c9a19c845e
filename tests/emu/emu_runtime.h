/* emu_runtime: the stand-in's streams and errors, for its other parts. Everything runs on the
 * calling thread, when the host waits or asks. */
#ifndef MD_EMU_RUNTIME_H
#define MD_EMU_RUNTIME_H

#include <cuda_runtime.h>
#include <functional>
#include <random>

/* Work on a stream; returns false when it cannot go on yet and has to be called again. */
typedef std::function<bool()> emu_work;

/* Puts work on a stream, or on the graph that the stream is recording. */
void emu_queue(cudaStream_t stream, emu_work work);
/* Lets some stream run a little. Returns whether there was anything to run. */
bool emu_step();
/* err, which cudaGetLastError gives next. */
cudaError_t emu_fail(cudaError_t err);
/* A number of the environment. */
long emu_environment(const char *name, long otherwise);
/* Whether this is the call of `what` that MD_EMU_FAIL = "what#N" lets fail. */
bool emu_fails(const char *what);
/* Draws every order that the stand-in chooses; MD_EMU_SEED, 1 when it is not set, is its seed. */
std::mt19937 &emu_random();

#endif
