/* base: status codes, failing, asserting, counted memory, fault sites.
 *
 * A md_status is also the exit code of the program (sysexits.h where it has a name), so a failure
 * keeps one number from the line that found it to the shell. A function that can fail returns
 * md_status and leaves one sentence in a per-thread slot (md_error_text); nobody prints where the
 * failure happens. Our own bugs do not return: MD_ASSERT reports and calls the abort hook. */
#ifndef MD_BASE_H
#define MD_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The headers of ops and groups are read by the CUDA side too, which is C++. */
#ifdef __cplusplus
#define MD_NORETURN [[noreturn]]
#define MD_C_BEGIN  extern "C" {
#define MD_C_END    }
#else
#define MD_NORETURN _Noreturn
#define MD_C_BEGIN
#define MD_C_END
#endif

MD_C_BEGIN

#define MD_VERSION "0.1.0"

/* X(name, exit code, what it means to a user) */
#define MD_STATUSES(X)                                                                 \
    X(MD_OK, 0, "success")                                                             \
    X(MD_ERR_USAGE, 64, "command line not understood")                                 \
    X(MD_ERR_DATA, 65, "input data is damaged or of the wrong kind")                   \
    X(MD_ERR_NOINPUT, 66, "an input file is missing or cannot be opened")              \
    X(MD_ERR_DEVICE, 69, "a device or another rank was lost")                          \
    X(MD_ERR_BUG, 70, "internal error of this program")                                \
    X(MD_ERR_MEMORY, 71, "out of memory")                                              \
    X(MD_ERR_CREATE, 73, "an output file cannot be created")                           \
    X(MD_ERR_IO, 74, "reading or writing a file failed")                               \
    X(MD_STOPPED, 75, "stopped with a checkpoint written: run the same command again") \
    X(MD_ERR_HANG, 76, "a rank stopped answering")                                     \
    X(MD_ERR_PERM, 77, "not permitted, or a directory is in use")                      \
    X(MD_ERR_CONFIG, 78, "configuration error")                                        \
    X(MD_ERR_NUMERICS, 79, "loss or gradients stayed non-finite")

typedef enum md_status {
#define MD_STATUS_ENUM(name, code, text) name = code,
    MD_STATUSES(MD_STATUS_ENUM)
#undef MD_STATUS_ENUM
} md_status;

/* Name ("MD_ERR_DATA") and meaning of a status; "unknown" for a number that is none. Local. */
const char *md_status_name(md_status st);
const char *md_status_text(md_status st);

/* The calling thread's last error sentence; "" when none. Valid until the thread fails again. */
const char *md_error_text(void);

/* Sets the calling thread's error sentence and returns st. Use through MD_FAIL. */
md_status md_error_set(md_status st, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Puts "<fmt>: " in front of the calling thread's error sentence and returns st unchanged. */
md_status md_error_prefix(md_status st, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define MD_FAIL(st, ...) return md_error_set((st), __VA_ARGS__)
#define MD_TRY(expr)                \
    do {                            \
        md_status md_try_ = (expr); \
        if (md_try_ != MD_OK)       \
            return md_try_;         \
    } while (0)

/* Broken invariant: prints rank, file:line, expression and the printf-style values, then runs the
 * abort hook (MPI_Abort once MPI is up, else _exit(70)). Also in release builds; never returns. */
#define MD_ASSERT(cond, ...)                                             \
    do {                                                                 \
        if (__builtin_expect(!(cond), 0))                                \
            md_assert_fail(__FILE__, __LINE__, #cond, ": " __VA_ARGS__); \
    } while (0)
MD_NORETURN void md_assert_fail(const char *file, int line, const char *cond, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* Who we are in the job: shown by asserts and fault sites, set once after MPI_Init. The hook ends
 * the whole job with the given exit code and must not return. */
void md_base_set_rank(int rank, int size);
int md_base_rank(void);
int md_base_size(void);
void md_base_set_abort_hook(void (*hook)(int code));
MD_NORETURN void md_abort(int code);
/* Ends this process at once, without a word to MPI: for a thread that may not call it. The launcher
 * then ends the other ranks. */
MD_NORETURN void md_exit_now(md_status code);

/* Host memory, counted. md_alloc returns 64-byte aligned (2 MiB and huge-page advised from 4 MiB
 * on) zeroed bytes, or NULL with the error sentence set (status MD_ERR_MEMORY is the caller's to
 * return). bytes == 0 gives a valid pointer. md_free(NULL) is fine. */
void *md_alloc(size_t bytes, const char *family);
void md_free(void *p);
/* Bytes held now and the most held at once, over all families. */
size_t md_alloc_now(void);
size_t md_alloc_peak(void);
/* MD_NEW(ptr, n): allocate n elements of *ptr or return MD_ERR_MEMORY. */
#define MD_NEW(ptr, n, family)                                   \
    do {                                                         \
        (ptr) = md_alloc(sizeof *(ptr) * (size_t)(n), (family)); \
        if (!(ptr))                                              \
            return MD_ERR_MEMORY;                                \
    } while (0)

/* Fault sites. MD_FAULT="site@rankR#N" (comma separated list; @rankR and #N optional) makes the
 * N-th pass of that site on that rank fail. With ":kill" or ":stop" it raises SIGKILL or SIGSTOP
 * instead, with ":slow=MS" it sleeps so many milliseconds. md_fault returns true when this pass
 * must fail; a site costs one branch when unset. Every site is listed in docs/FAILURES.md. */
bool md_fault(const char *site);

/* Monotonic seconds since an arbitrary start. */
double md_now(void);

#define MD_MIN(a, b)    ((a) < (b) ? (a) : (b))
#define MD_MAX(a, b)    ((a) > (b) ? (a) : (b))
#define MD_COUNT(array) (sizeof(array) / sizeof((array)[0]))

MD_C_END

#endif
