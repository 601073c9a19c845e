/* fake_device: the cpu backend behind memory that the host cannot read, in f32 or bf16. It proves
 * what moves operands to a device and back, and what tests of bf16 allow, where there is no GPU. */
#ifndef MD_FAKE_DEVICE_H
#define MD_FAKE_DEVICE_H

#include "kernels/backend.h"

/* Its addresses are not mapped: a read or write by the host ends the program. bf16: every op
 * computes in f32 and rounds its outputs. Nothing is deferred, nothing records. */
md_status fake_device_create(int threads, md_dtype compute, md_backend **out);

/* The host's view of an address of the fake device. */
void *fake_device_host(void *p);

#endif
