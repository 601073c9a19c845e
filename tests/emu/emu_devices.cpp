/* emu_devices: errors and devices of CUDA's runtime on the CPU, and what the environment asks of
 * the stand-in. */
#include "tests/emu/emu_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace
{

std::map<std::string, long> calls;
cudaError_t last_error;
int current_device;

} // namespace

long emu_environment(const char *name, long otherwise)
{
    const char *text = std::getenv(name);
    return text ? std::strtol(text, nullptr, 10) : otherwise;
}

std::mt19937 &emu_random()
{
    static std::mt19937 source((unsigned)emu_environment("MD_EMU_SEED", 1));
    return source;
}

cudaError_t emu_fail(cudaError_t err)
{
    last_error = err;
    return err;
}

bool emu_fails(const char *what)
{
    const char *spec = std::getenv("MD_EMU_FAIL");
    if (!spec)
        return false;
    const size_t n = std::strlen(what);
    return std::strncmp(spec, what, n) == 0 && spec[n] == '#' &&
           ++calls[what] == std::strtol(spec + n + 1, nullptr, 10);
}

const char *cudaGetErrorString(cudaError_t err)
{
    static const char *const text[] = {"no error",
                                       "invalid argument",
                                       "out of memory",
                                       "invalid configuration argument",
                                       "no CUDA-capable device is detected",
                                       "invalid device ordinal",
                                       "device not ready",
                                       "unspecified launch failure",
                                       "operation not permitted when stream is capturing"};
    return (size_t)err < sizeof text / sizeof *text ? text[err] : "unknown error";
}

cudaError_t cudaGetLastError(void)
{
    const cudaError_t err = last_error;
    last_error = cudaSuccess;
    return err;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = emu_environment("MD_EMU_DEVICES", 1) < 0 ? 0 : 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = (int)emu_environment("MD_EMU_DEVICES", 1);
    return *count > 0 ? cudaSuccess : emu_fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= emu_environment("MD_EMU_DEVICES", 1))
        return emu_fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int)
{
    std::snprintf(prop->name, sizeof prop->name, "emulated GPU");
    prop->major = 9;
    prop->minor = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int device)
{
    cudaDeviceProp prop;
    cudaGetDeviceProperties(&prop, device);
    *value = which == cudaDevAttrMultiProcessorCount      ? (int)emu_environment("MD_EMU_SMS", 132)
             : which == cudaDevAttrComputeCapabilityMajor ? prop.major
                                                          : prop.minor;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device)
{
    std::snprintf(id, (size_t)size, "0000:%02X:00.0", device);
    return cudaSuccess;
}
