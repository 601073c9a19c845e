/* Groups for operands that the host cannot read: what a collective moves is copied there and back.
 * And which carrier a backend gets. */
#include "tests/ops/fake_device.h"
#include "tests/par/groups.h"

enum { PART = 50 };

/* A device, a group for its operands, and memory there for any collective. */
typedef struct device {
    md_backend *be;
    md_comm *c;
    int32_t *x, *y;
} device;

static void open_device(device *d, const char *kind)
{
    const size_t bytes = MAX_RANKS * PART * sizeof *d->x;
    assert_ok(fake_device_create(1, MD_F32, &d->be));
    assert_ok(md_comm_for_backend(par_world, d->be, kind, &d->c));
    assert_int_equal(md_comm_size(d->c), md_comm_size(par_world));
    assert_int_equal(md_comm_rank(d->c), md_comm_rank(par_world));
    assert_ok(md_backend_alloc(d->be, bytes, "test", (void **)&d->x));
    assert_ok(md_backend_alloc(d->be, bytes, "test", (void **)&d->y));
}

static void close_device(device *d)
{
    md_backend_free(d->be, d->x);
    md_backend_free(d->be, d->y);
    md_comm_free(d->c);
    md_backend_destroy(d->be);
}

static int rank_of(const device *d)
{
    return md_comm_rank(d->c);
}

/* x[0, n) = the rank's values, y[0, n) = -1. */
static void put(const device *d, int n, int salt)
{
    static int32_t x[MAX_RANKS * PART], y[MAX_RANKS * PART];
    for (int i = 0; i < n; i++) {
        x[i] = value(i + salt, rank_of(d));
        y[i] = -1;
    }
    assert_ok(md_backend_upload(d->be, d->x, x, (size_t)n * sizeof *x));
    assert_ok(md_backend_upload(d->be, d->y, y, (size_t)n * sizeof *y));
}

static const int32_t *get(const device *d, const int32_t *from, int n)
{
    static int32_t here[MAX_RANKS * PART];
    assert_ok(md_backend_download(d->be, here, from, (size_t)n * sizeof *here));
    assert_ok(md_backend_sync(d->be));
    return here;
}

static void check_sums(const device *d, const int32_t *from, int first, int n)
{
    const int32_t *have = get(d, from, n);
    for (int i = 0; i < n; i++)
        assert_int_equal(have[i], expected(first + i, md_comm_size(d->c), MD_SUM));
}

static void check_gathered(const device *d, const int32_t *from, int salt)
{
    const int32_t *have = get(d, from, md_comm_size(d->c) * PART);
    for (int i = 0; i < md_comm_size(d->c) * PART; i++)
        assert_int_equal(have[i], value(i % PART + salt, i / PART));
}

static void check_blocking(device *d)
{
    const int size = md_comm_size(d->c), rank = rank_of(d), n = size * PART;
    put(d, PART, 0);
    md_comm_allreduce(d->c, d->x, PART, MD_I32, MD_SUM);
    check_sums(d, d->x, 0, PART);
    put(d, n, 0);
    md_comm_reduce_scatter(d->c, d->x, d->y, n, MD_I32);
    check_sums(d, d->y, rank * PART, PART);
    put(d, n, 3);
    md_comm_allgather(d->c, d->x, d->y, PART * sizeof *d->x);
    check_gathered(d, d->y, 3);
    for (int root = 0; root < size; root++) {
        put(d, PART, root);
        md_comm_bcast(d->c, d->x, PART * sizeof *d->x, root);
        const int32_t *have = get(d, d->x, PART);
        for (int i = 0; i < PART; i++)
            assert_int_equal(have[i], value(i + root, root));
    }
    md_comm_barrier(d->c);
    assert_int_equal(md_comm_exscan(d->c, 2), 2 * rank);
}

static void check_begun(device *d)
{
    const int n = md_comm_size(d->c) * PART;
    md_comm_request req[2] = {0};
    put(d, n, 0);
    md_comm_reduce_scatter_begin(d->c, d->x, d->y, n, MD_I32, &req[0]);
    while (!md_comm_poll(d->c, req, 2))
        ;
    md_comm_allreduce_begin(d->c, d->x, PART, MD_I32, MD_SUM, &req[1]);
    md_comm_wait(d->c, &req[1]);
    md_comm_wait(d->c, &req[0]);
    check_sums(d, d->y, rank_of(d) * PART, PART);
    check_sums(d, d->x, 0, PART);
    put(d, PART, 5);
    md_comm_allgather(d->c, d->x, d->y, PART * sizeof *d->x);
    put(d, 1, 0); /* other values in x and y[0], which is rank 0's */
    if (rank_of(d) == 0) {
        const int32_t first = value(5, 0);
        assert_ok(md_backend_upload(d->be, d->y, &first, sizeof first));
    }
    md_comm_allgather_begin(d->c, d->y, PART * sizeof *d->x, &req[0]);
    md_comm_wait(d->c, &req[0]);
    check_gathered(d, d->y, 5);
}

static void test_device_memory(void **state)
{
    (void)state;
    device d;
    open_device(&d, "mpi");
    check_blocking(&d);
    check_begun(&d);
    assert_ok(md_comm_reserve(d.c, MAX_RANKS * PART * sizeof *d.x, 3));
    const size_t held = md_alloc_now();
    check_begun(&d);
    check_blocking(&d);
    assert_int_equal(md_alloc_now(), held);
    close_device(&d);
}

/* Without NCCL "auto" goes by MPI; a group on host memory needs nothing. */
static void test_kinds(void **state)
{
    (void)state;
    device d;
    md_backend *host;
    md_comm *c;
    open_device(&d, "auto");
    check_blocking(&d);
    if (md_comm_size(par_world) > 1) {
        assert_int_equal(md_comm_for_backend(par_world, d.be, "nccl", &c), MD_ERR_CONFIG);
        assert_non_null(strstr(md_error_text(), "parallel.comm = \"mpi\""));
    }
    close_device(&d);
    assert_ok(md_backend_create("cpu", 1, &host));
    assert_ok(md_comm_for_backend(par_world, host, "auto", &c));
    assert_ptr_equal(c, par_world);
    md_backend_destroy(host);
}

static void test_own_devices(void **state)
{
    (void)state;
    device d;
    const int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    char line[32];
    open_device(&d, "mpi");
    snprintf(d.be->device, sizeof d.be->device, "card %d", rank);
    assert_ok(md_comm_own_devices(par_world, d.be));
    snprintf(d.be->device, sizeof d.be->device, "card %d", rank / 2);
    if (size > 1) {
        assert_int_equal(md_comm_own_devices(par_world, d.be), MD_ERR_CONFIG);
        assert_non_null(strstr(md_error_text(), "\n  rank 0 "));
        snprintf(line, sizeof line, "\n  rank %d ", size - 1);
        assert_int_equal(strstr(md_error_text(), line) != NULL, size % 2 == 0);
    } else {
        assert_ok(md_comm_own_devices(par_world, d.be));
    }
    close_device(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_device_memory),
    cmocka_unit_test(test_kinds),
    cmocka_unit_test(test_own_devices),
};

PAR_MAIN(tests)
