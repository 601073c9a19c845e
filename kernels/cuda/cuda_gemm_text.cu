/* cuda_gemm_text: the chosen algorithms as text, a line a plan, so that a run can be repeated with
 * them. An algorithm is opaque: it is kept as the library gave it, and holds for the same version
 * of the library on the same kind of GPU only, which the first line names. */
#include "kernels/cuda/cuda_gemm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE 400

enum { KEY_NUMBERS = 10, ALGO_WORDS = sizeof(cublasLtMatmulAlgo_t) / sizeof(uint64_t) };

/* "md_hpc products 1: cuBLASLt 130100 on H100 80GB HBM3"; without the place of the GPU, which is
 * behind the last blank of its name. */
static void first_line(const md_backend *be, char *line, size_t size)
{
    const char *end = strrchr(be->device, ' ');
    const int n = end ? (int)(end - be->device) : (int)strlen(be->device);
    snprintf(line, size, "md_hpc products 1: cuBLASLt %zu on %.*s\n", cublasLtGetVersion(), n,
             be->device);
}

static void plan_line(const cuda_gemm_plan *p, char *line, size_t size)
{
    const cuda_gemm_key *k = &p->key;
    int used = snprintf(line, size, "%lld %lld %lld %d %d %d %d %d %d %d %d %zu", (long long)k->m,
                        (long long)k->n, (long long)k->k, k->trans_a, k->trans_b, k->accumulate,
                        k->bias, k->in, k->out, k->align, p->own, p->workspace);
    for (int i = 0; i < ALGO_WORDS; i++)
        used += snprintf(line + used, size - (size_t)used, " %llx",
                         (unsigned long long)p->algo.data[i]);
    snprintf(line + used, size - (size_t)used, "\n");
}

md_status cuda_gemm_write(md_backend *be, char **out)
{
    const cuda_gemm_table *t = cuda_state_of(be)->gemm;
    const size_t size = (size_t)(t->plans + 1) * LINE;
    char *text = static_cast<char *>(md_alloc(size, "choices"));
    if (!text)
        return MD_ERR_MEMORY;
    first_line(be, text, LINE);
    for (int i = 0; i < t->plans; i++) {
        const size_t used = strlen(text);
        plan_line(&t->plan[i], text + used, size - used);
    }
    *out = text;
    return MD_OK;
}

/* The next number of a line, in this base; fails quietly with *ok = false. */
static unsigned long long number(const char **at, int base, bool *ok)
{
    char *end;
    const unsigned long long x = strtoull(*at, &end, base);
    *ok = *ok && end != *at;
    *at = end;
    return x;
}

static bool parse(const char *line, cuda_gemm_plan *p)
{
    bool ok = true;
    long long n[KEY_NUMBERS];
    for (int i = 0; i < KEY_NUMBERS; i++)
        n[i] = (long long)number(&line, 10, &ok);
    cuda_gemm_key *k = &p->key;
    k->m = n[0], k->n = n[1], k->k = n[2];
    k->trans_a = (uint8_t)n[3], k->trans_b = (uint8_t)n[4];
    k->accumulate = (uint8_t)n[5], k->bias = (uint8_t)n[6];
    k->in = (uint8_t)n[7], k->out = (uint8_t)n[8], k->align = (uint8_t)n[9];
    p->own = number(&line, 10, &ok) != 0;
    p->workspace = (size_t)number(&line, 10, &ok);
    for (int i = 0; i < ALGO_WORDS; i++)
        p->algo.data[i] = number(&line, 16, &ok);
    return ok && *line == '\n' && p->workspace <= CUDA_GEMM_WORKSPACE;
}

md_status cuda_gemm_read(md_backend *be, const char *text)
{
    cuda_state *s = cuda_state_of(be);
    char want[LINE];
    first_line(be, want, sizeof want);
    if (strncmp(text, want, strlen(want)) != 0)
        MD_FAIL(MD_ERR_DATA, "choices of another cuBLASLt or GPU: \"%.*s\"",
                (int)strcspn(text, "\n"), text);
    for (const char *line = strchr(text, '\n') + 1; *line; line = strchr(line, '\n') + 1) {
        cuda_gemm_plan p = {};
        if (!strchr(line, '\n') || !parse(line, &p))
            MD_FAIL(MD_ERR_DATA, "no choice: \"%.60s\"", line);
        MD_TRY(cuda_gemm_take(s, &p));
    }
    return MD_OK;
}
