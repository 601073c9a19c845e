/* bench_checkpoint: time of md_checkpoint_write, all its checks and syncs included, against the
 * best plain parallel write and fsync of the same bytes to the same disk, interleaved.
 *
 *   mpirun -np 2 build/bench/bench_checkpoint [DIR [ROUNDS [LAYERS]]]
 *
 * The state is that of a ViT-B with LAYERS blocks (12): parameters and two moments, about 1 GiB. It
 * is written as data parallel ranks do, each a stretch of the file, and as tensor parallel ranks do
 * when all matrices are cut by columns: runs of 1/ranks of a row.
 * Plain writes: one shared file in pieces of 1 MiB and 8 MiB, also with its space reserved, and one
 * file per rank. Prints one JSON line. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/checkpoint.h"
#include "mpi/agree.h"
#include "mpi/comm_mpi.h"

enum { WIDTH = 768, PER_LAYER = 4, KINDS = 3, MAX_LAYERS = 64, MAX_ROUNDS = 99 };

enum { SHARED_1M, SHARED_8M, RESERVED, FILE_PER_RANK, CHECKPOINT, COLUMNS, WAYS };
static const char *const way_name[WAYS] = {"shared_1m",     "shared_8m",  "shared_8m_reserved",
                                           "file_per_rank", "checkpoint", "checkpoint_columns"};

typedef struct bench {
    md_comm *world;
    const char *dir;
    md_state_item item[MAX_LAYERS * PER_LAYER * KINDS], cut[MAX_LAYERS * PER_LAYER * KINDS];
    char name[MAX_LAYERS * PER_LAYER * KINDS][MD_STATE_NAME];
    int items;
    char *data; /* this rank's blocks, one behind the other */
    int64_t bytes, total;
} bench;

/* A whole matrix's columns of rank `rank` of `size`. */
static void cut_columns(md_state_item *it, int rank, int size)
{
    int64_t rows = it->global[0], cols = it->global[1], lo = cols * rank / size;
    int64_t run = cols * (rank + 1) / size - lo;
    it->view = (md_view){lo, run, cols, rows};
    it->count = rows * run;
}

/* The items' data lies in `data`, one behind the other; returns its bytes. */
static int64_t place(md_state_item *item, int items, char *data)
{
    int64_t at = 0;
    for (int i = 0; i < items; i++) {
        item[i].data = data ? data + at : NULL;
        at += item[i].count * 4;
    }
    return at;
}

/* Every rank writes its share of the arrays, as a training run does. */
static md_status make_state(bench *b, int layers)
{
    static const char *const kind[KINDS] = {"param", "m", "v"};
    static const char *const layer[PER_LAYER] = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"};
    int rank = md_comm_rank(b->world), size = md_comm_size(b->world);
    static const int64_t dim[PER_LAYER][2] = {
        {3 * WIDTH, WIDTH}, {WIDTH, WIDTH}, {4 * WIDTH, WIDTH}, {WIDTH, 4 * WIDTH}};
    for (int k = 0; k < KINDS; k++)
        for (int l = 0; l < layers; l++)
            for (int p = 0; p < PER_LAYER; p++) {
                int i = b->items++;
                snprintf(b->name[i], MD_STATE_NAME, "%s/blocks.%d.%s.weight", kind[k], l, layer[p]);
                md_tensor t = md_tensor_make(NULL, MD_F32, 2, dim[p]);
                b->item[i] = b->cut[i] = md_state_item_make(b->name[i], &t);
                cut_columns(&b->cut[i], rank, size);
                b->total += (int64_t)md_tensor_bytes(&t);
            }
    md_state_items_share(b->item, b->items, rank, size);
    b->bytes = place(b->item, b->items, NULL);
    int64_t most = MD_MAX(b->bytes, place(b->cut, b->items, NULL));
    MD_NEW(b->data, most, "bench");
    float *x = (float *)(void *)b->data;
    for (int64_t i = 0; i < most / 4; i++)
        x[i] = (float)(i % 1000003) * 1e-6f;
    place(b->item, b->items, b->data);
    place(b->cut, b->items, b->data);
    return MD_OK;
}

static md_status plain_write(const bench *b, const char *path, int64_t at, int64_t piece)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        MD_FAIL(MD_ERR_CREATE, "%s: %s", path, strerror(errno));
    for (int64_t done = 0; done < b->bytes;) {
        ssize_t n = pwrite(fd, b->data + done, (size_t)MD_MIN(piece, b->bytes - done), at + done);
        if (n <= 0) {
            close(fd);
            MD_FAIL(MD_ERR_IO, "%s: %s", path, strerror(errno));
        }
        done += n;
    }
    int failed = fsync(fd) != 0;
    close(fd);
    if (failed)
        MD_FAIL(MD_ERR_IO, "%s: %s", path, strerror(errno));
    return MD_OK;
}

static md_status reserve(const char *path, int64_t bytes)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0 || fallocate(fd, 0, 0, bytes) != 0)
        MD_FAIL(MD_ERR_IO, "%s: %s", path, strerror(errno));
    close(fd);
    return MD_OK;
}

static md_status run_way(const bench *b, int way, const char *path, int64_t at)
{
    md_checkpoint_args args = {.comm = b->world, .item = b->item, .items = b->items};
    switch (way) {
    case COLUMNS:
        args.item = b->cut;
        return md_checkpoint_write_file(&args, path);
    case CHECKPOINT:
        return md_checkpoint_write_file(&args, path);
    case RESERVED:
        MD_TRY(md_agree(b->world, md_comm_rank(b->world) == 0 ? reserve(path, b->total) : MD_OK));
        return plain_write(b, path, at, 8 << 20);
    case FILE_PER_RANK:
        return plain_write(b, path, 0, 8 << 20);
    default:
        return plain_write(b, path, at, way == SHARED_1M ? 1 << 20 : 8 << 20);
    }
}

/* Seconds from the first rank's start to the last one's end, on a new file. */
static md_status time_way(const bench *b, int way, double *seconds)
{
    char path[1024];
    int64_t at = md_comm_exscan(b->world, b->bytes);
    snprintf(path, sizeof path, "%s/bench-checkpoint-%d", b->dir,
             way == FILE_PER_RANK ? md_comm_rank(b->world) : 0);
    md_comm_barrier(b->world);
    double start = md_now();
    md_status st = run_way(b, way, path, at);
    md_comm_barrier(b->world);
    *seconds = md_now() - start;
    unlink(path);
    md_comm_barrier(b->world);
    return st;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const bench *b, double t[WAYS][MAX_ROUNDS], int rounds)
{
    double median[WAYS], best = 1e30;
    for (int w = 0; w < WAYS; w++) {
        qsort(t[w], (size_t)rounds, sizeof t[w][0], by_value);
        median[w] = t[w][rounds / 2];
        if (w < CHECKPOINT)
            best = MD_MIN(best, median[w]);
    }
    printf("{\"bench\": \"checkpoint\", \"ranks\": %d, \"mib\": %.1f, \"rounds\": %d",
           md_comm_size(b->world), (double)b->total / (1 << 20), rounds);
    for (int w = 0; w < WAYS; w++)
        printf(", \"%s_s\": %.3f", way_name[w], median[w]);
    printf(", \"mib_per_s\": %.0f, \"ratio\": %.3f}\n",
           (double)b->total / (1 << 20) / median[CHECKPOINT], best / median[CHECKPOINT]);
}

static md_status run(bench *b, int rounds, int layers)
{
    static double t[WAYS][MAX_ROUNDS];
    double ignored;
    MD_TRY(make_state(b, layers));
    MD_TRY(time_way(b, 0, &ignored)); /* the first write of a while is slower */
    for (int r = 0; r < rounds; r++)
        for (int k = 0; k < WAYS; k++) { /* in turning order: who follows whom matters */
            int w = (r + k) % WAYS;
            MD_TRY(time_way(b, w, &t[w][r]));
        }
    if (md_comm_rank(b->world) == 0)
        report(b, t, rounds);
    return MD_OK;
}

int main(int argc, char **argv)
{
    static bench b;
    md_status st = md_mpi_start(&argc, &argv, &b.world);
    if (st == MD_OK) {
        b.dir = argc > 1 ? argv[1] : ".";
        int rounds = argc > 2 ? atoi(argv[2]) : 5, layers = argc > 3 ? atoi(argv[3]) : 12;
        rounds = MD_MIN(MD_MAX(rounds, 1), MAX_ROUNDS);
        st = run(&b, rounds, MD_MIN(MD_MAX(layers, 1), MAX_LAYERS));
        md_free(b.data);
        md_mpi_stop(b.world);
    }
    if (st != MD_OK)
        fprintf(stderr, "%s\n", md_error_text());
    return st;
}
