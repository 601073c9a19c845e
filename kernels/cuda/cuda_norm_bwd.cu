/* cuda_norm_bwd: backward of the residual step with its LayerNorm. A block's sums for the gradients
 * of parameters go to the scratch, [BWD_SUMS][blocks][C]: dgamma, dweight, dbias, dbranch_sum.
 * Their columns stay in registers, so few blocks each go through many rows. They take batches of
 * rows in turn, so that what all of them read at a time lies close together. While a block works on
 * a batch, its next ones are on their way to shared memory: each thread copies what it alone will
 * read. */
#include "kernels/cuda/cuda_norm.cuh"

#define BWD_SUMS 4
/* Rows of a batch, and batches of a block in shared memory (the one it works on, those to come), of
 * rows for up to BWD_NARROW threads and of longer ones. */
#define BWD_NARROW        192
#define BWD_NARROW_ROWS   4
#define BWD_NARROW_STAGES 2
#define BWD_WIDE_ROWS     1
#define BWD_WIDE_STAGES   3
/* Rows of a block at least: three narrow batches, so that one stage serves twice. */
#define BWD_LEAST ((BWD_NARROW_STAGES + 1) * BWD_NARROW_ROWS)
/* Threads of a multiprocessor, and blocks at most, since each has sums of its own: one block of
 * rows of 1,280, with two of which an H100 takes a tenth longer; other widths have not been
 * measured. */
#define BWD_THREADS 192
#define BWD_PER_SM  4
/* Shared memory begins with the sums of two batches of R rows, in bytes; the stages follow. */
#define BWD_ROW_SUMS(R, threads) (2 * 2 * (R) * ((threads) / MD_WARP) * (int)sizeof(float))

namespace
{

/* Operands of a batch in shared memory. */
enum { SLOT_DR, SLOT_BRANCH, SLOT_R, SLOT_DY, BWD_OPERANDS };

/* What a thread works on: a batch of the rows [row, end), at the columns from col on. end is 0
 * where there are no such columns. */
struct md_ln_spot {
    int row, end, col;
};

/* Sends the vector at `col` of row `at`, zeros where that is -1, to shared memory. */
template <class T> MD_DEV void md_ln_send(uint4 *slot, const T *p, int at, int cols, int col)
{
    md_async_copy16(slot, p + md_ln_at(at < 0 ? 0 : at, cols, col), at >= 0);
}

/* branch only where dgamma is wanted, part only where a sum is. */
template <class T> struct md_ln_bwd {
    const T *r, *branch, *dr, *dy;
    const float *gamma, *weight, *mean, *rstd;
    T *dx, *dbranch;
    float *part;
    md_ln_images images;
    int rows, cols;
    float per_col; /* 1 / C */
};

/* An operand that is there: all are in a kernel for ALL of them, which asks for none. */
template <bool ALL, class P> MD_DEV bool md_given(const P *p)
{
    return ALL || p;
}

/* What one thread keeps of its columns. */
template <int N> struct md_ln_columns {
    float gamma[N], weight[N];
    float dgamma[N], dweight[N], dbias[N], dbranch[N];
};

/* What a batch of rows has for each row, and the sums over a row that LN' needs, of dy weight and
 * of dy weight xhat. */
template <int R> struct md_ln_rows_of {
    float mean[R], rstd[R];
    md_ln_places<R> place;
};
template <int R> struct md_ln_batch {
    md_ln_rows_of<R> row;
    float sums[2 * R];
};

/* Sends a batch to this thread's slots of a stage, which lie blockDim.x apart, and reads the
 * statistics. Rows that are not there become zeros. */
template <class T, int R, bool ALL>
MD_DEV void md_ln_bwd_fetch(const md_ln_bwd<T> &k, md_ln_spot spot, uint4 *slot,
                            md_ln_rows_of<R> &of)
{
    const bool normed = md_given<ALL>(k.dy);
    const T *from[BWD_OPERANDS];
    from[SLOT_DR] = k.dr, from[SLOT_BRANCH] = k.branch;
    from[SLOT_R] = normed ? k.r : nullptr, from[SLOT_DY] = k.dy;
    md_places_of(k.images, spot.row, spot.end, of.place);
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int own = spot.row + i < spot.end ? spot.row + i : -1, to = of.place.to[i];
        int at[BWD_OPERANDS];
        at[SLOT_DR] = own, at[SLOT_BRANCH] = of.place.from[i];
        at[SLOT_R] = to < 0 ? -1 : own, at[SLOT_DY] = to;
#pragma unroll
        for (int o = 0; o < BWD_OPERANDS; o++)
            if (md_given<ALL>(from[o]))
                md_ln_send(slot + (o * R + i) * blockDim.x, from[o], at[o], k.cols, spot.col);
        of.mean[i] = normed && own >= 0 ? k.mean[own] : 0.0f;
        of.rstd[i] = normed && own >= 0 ? k.rstd[own] : 0.0f;
    }
    md_async_commit();
}

/* Numbers of an operand in row i of the batch that has come; `slot` is this thread's. */
template <class T, int R>
MD_DEV void md_ln_take(const uint4 *slot, int operand, int i, float (&x)[md_vec<T>::N])
{
    md_raw<T>::unpack(slot[(operand * R + i) * blockDim.x], x);
}

template <class T, int R>
MD_DEV void md_ln_bwd_sums(const uint4 *slot, const float (&weight)[md_vec<T>::N],
                           md_ln_batch<R> &b)
{
    enum { N = md_vec<T>::N };
#pragma unroll
    for (int i = 0; i < R; i++) {
        float r[N], dy[N];
        md_ln_take<T, R>(slot, SLOT_R, i, r);
        md_ln_take<T, R>(slot, SLOT_DY, i, dy);
        b.sums[2 * i] = b.sums[2 * i + 1] = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float g = dy[j] * weight[j];
            b.sums[2 * i] += g;
            b.sums[2 * i + 1] += g * (r[j] - b.row.mean[i]);
        }
        b.sums[2 * i + 1] *= b.row.rstd[i];
    }
}

/* Row i of the batch: writes dx and dbranch and adds to the columns. The vectors come from shared
 * memory once more: in registers they would have to wait for the sums. */
template <class T, int R, bool ALL>
MD_DEV void md_ln_bwd_row(const md_ln_bwd<T> &k, md_ln_spot spot, const uint4 *slot,
                          const md_ln_batch<R> &b, int i, md_ln_columns<md_vec<T>::N> &c)
{
    enum { N = md_vec<T>::N };
    float g[N] = {};
    if (md_given<ALL>(k.dr))
        md_ln_take<T, R>(slot, SLOT_DR, i, g);
    if (md_given<ALL>(k.dy)) {
        const float s1 = b.sums[2 * i] * k.per_col, s2 = b.sums[2 * i + 1] * k.per_col;
        float r[N], dy[N];
        md_ln_take<T, R>(slot, SLOT_R, i, r);
        md_ln_take<T, R>(slot, SLOT_DY, i, dy);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float xhat = (r[j] - b.row.mean[i]) * b.row.rstd[i];
            g[j] += b.row.rstd[i] * (dy[j] * c.weight[j] - s1 - xhat * s2);
            c.dweight[j] += dy[j] * xhat;
            c.dbias[j] += dy[j];
        }
    }
    md_vec<T>::store(k.dx + md_ln_at(spot.row + i, k.cols, spot.col), g);
#pragma unroll
    for (int j = 0; j < N; j++)
        g[j] *= b.row.place.keep[i];
    if (md_given<ALL>(k.branch)) {
        float branch[N];
        md_ln_take<T, R>(slot, SLOT_BRANCH, i, branch);
#pragma unroll
        for (int j = 0; j < N; j++)
            c.dgamma[j] += branch[j] * g[j];
    }
    if (md_given<ALL>(k.dbranch) && b.row.place.from[i] >= 0) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            g[j] *= c.gamma[j];
            c.dbranch[j] += g[j];
        }
        md_vec<T>::store(k.dbranch + md_ln_at(b.row.place.from[i], k.cols, spot.col), g);
    }
}

template <class T>
MD_DEV void md_ln_bwd_begin(md_ln_columns<md_vec<T>::N> &c, const md_ln_bwd<T> &k, int col,
                            bool there)
{
    md_parameters(k.gamma, col, there, 1.0f, c.gamma);
    md_parameters(k.weight, col, there, 1.0f, c.weight);
#pragma unroll
    for (int j = 0; j < md_vec<T>::N; j++)
        c.dgamma[j] = c.dweight[j] = c.dbias[j] = c.dbranch[j] = 0.0f;
}

/* R rows of a batch, S stages. ALL: dr, branch, dy with r, dbranch and part are there. */
template <class T, int THREADS, int R, int S, bool ALL>
MD_KERNEL(THREADS)
md_ln_bwd_rows(md_ln_bwd<T> k)
{
    enum { N = md_vec<T>::N };
    const int threads = (int)blockDim.x, stage = BWD_OPERANDS * R * threads;
    const int col = (int)threadIdx.x * N, end = col < k.cols ? k.rows : 0;
    const int next = (int)gridDim.x * R; /* rows from a batch of this block to its next one */
    float *smem = reinterpret_cast<float *>(md_smem());
    uint4 *slot = reinterpret_cast<uint4 *>(md_smem() + BWD_ROW_SUMS(R, threads)) + threadIdx.x;
    md_ln_rows_of<R> coming[S - 1];
    md_ln_spot spot = {(int)blockIdx.x * R, end, col};
    int from = 0, to = 0; /* slots of this batch, and of the last one to come */
#pragma unroll
    for (int s = 0; s < S - 1; s++, to += stage)
        md_ln_bwd_fetch<T, R, ALL>(k, {spot.row + s * next, end, col}, slot + to, coming[s]);
    md_ln_columns<N> c;
    md_ln_bwd_begin(c, k, col, col < k.cols);
    /* turn: two calls of md_block_sums in a row need two places */
    for (int turn = 0; spot.row < k.rows; spot.row += next, turn ^= 1) {
        md_ln_batch<R> b;
        b.row = coming[0];
#pragma unroll
        for (int s = 1; s < S - 1; s++)
            coming[s - 1] = coming[s];
        md_ln_bwd_fetch<T, R, ALL>(k, {spot.row + (S - 1) * next, end, col}, slot + to,
                                   coming[S - 2]);
        to = to == (S - 1) * stage ? 0 : to + stage;
        md_async_wait<S - 1>();
        if (md_given<ALL>(k.dy)) {
            md_ln_bwd_sums<T>(slot + from, c.weight, b);
            md_block_sums(b.sums, smem + turn * 2 * R * (threads / MD_WARP));
        }
#pragma unroll
        for (int i = 0; i < R; i++)
            if (spot.row + i < end)
                md_ln_bwd_row<T, R, ALL>(k, spot, slot + from, b, i, c);
        from = from == (S - 1) * stage ? 0 : from + stage;
    }
    md_async_wait<0>();
    if (!md_given<ALL>(k.part) || col >= k.cols)
        return;
    float *part = k.part + md_ln_at((int)blockIdx.x, k.cols, col);
    const int64_t sums = (int64_t)gridDim.x * k.cols;
    md_put(part, c.dgamma);
    md_put(part + sums, c.dweight);
    md_put(part + 2 * sums, c.dbias);
    md_put(part + 3 * sums, c.dbranch);
}

/* One row of md_ln_bwd_any; s1, s2 as the sums above over the width. */
template <class T>
MD_DEV void md_ln_bwd_any_row(const md_ln_bwd<T> &k, int row, const md_ln_rows_of<1> &of, float s1,
                              float s2, float *part)
{
    const int64_t next = (int64_t)gridDim.x * k.cols;
    const int from = of.place.from[0], to = of.place.to[0];
    for (int c = (int)threadIdx.x; c < k.cols; c += VEC_BLOCK) {
        const int64_t at = md_ln_at(row, k.cols, c);
        float g = k.dr ? md_load(k.dr + at) : 0.0f;
        if (k.dy && to >= 0) {
            const float xhat = (md_load(k.r + at) - of.mean[0]) * of.rstd[0];
            const float dy = md_load(k.dy + md_ln_at(to, k.cols, c));
            g += of.rstd[0] * (dy * (k.weight ? k.weight[c] : 1.0f) - s1 - xhat * s2);
            if (part) {
                part[next + c] += dy * xhat;
                part[2 * next + c] += dy;
            }
        }
        md_store(k.dx + at, g);
        if (from < 0)
            continue;
        const float keep = of.place.keep[0];
        if (k.branch)
            part[c] += keep * md_load(k.branch + md_ln_at(from, k.cols, c)) * g;
        if (!k.dbranch)
            continue;
        const float dbranch = keep * (k.gamma ? k.gamma[c] : 1.0f) * g;
        md_store(k.dbranch + md_ln_at(from, k.cols, c), dbranch);
        if (part)
            part[3 * next + c] += dbranch;
    }
}

/* Any width and address: a thread has every VEC_BLOCK-th column, also of the block's sums in the
 * scratch. */
template <class T> MD_KERNEL(VEC_BLOCK) md_ln_bwd_any(md_ln_bwd<T> k)
{
    float *smem = reinterpret_cast<float *>(md_smem());
    float *part = k.part ? k.part + md_ln_at((int)blockIdx.x, k.cols, 0) : nullptr;
    for (int c = (int)threadIdx.x; part && c < k.cols; c += VEC_BLOCK)
        for (int s = 0; s < BWD_SUMS; s++)
            part[s * (int64_t)gridDim.x * k.cols + c] = 0.0f;
    int turn = 0;
    for (int row = (int)blockIdx.x; row < k.rows; row += (int)gridDim.x, turn ^= 1) {
        float sums[2] = {0.0f, 0.0f};
        md_ln_rows_of<1> of;
        md_places_of(k.images, row, k.rows, of.place);
        of.mean[0] = k.dy ? k.mean[row] : 0.0f;
        of.rstd[0] = k.dy ? k.rstd[row] : 0.0f;
        if (k.dy && of.place.to[0] >= 0) {
            const T *r = k.r + md_ln_at(row, k.cols, 0);
            const T *dy = k.dy + md_ln_at(of.place.to[0], k.cols, 0);
            for (int c = (int)threadIdx.x; c < k.cols; c += VEC_BLOCK) {
                const float g = md_load(&dy[c]) * (k.weight ? k.weight[c] : 1.0f);
                sums[0] += g;
                sums[1] += g * ((md_load(&r[c]) - of.mean[0]) * of.rstd[0]);
            }
        }
        if (k.dy)
            md_block_sums(sums, smem + turn * 2 * VEC_WARPS);
        md_ln_bwd_any_row(k, row, of, sums[0] * k.per_col, sums[1] * k.per_col, part);
    }
}

bool wants_sums(const md_residual_ln_bwd_args *a)
{
    return a->dgamma || a->dweight || a->dbias || a->dbranch_sum;
}

int64_t bwd_chunks(const md_backend *be, const md_tensor *dx)
{
    const int64_t vectors = md_tensor_cols(dx) / (cuda_is_bf16(dx) ? 8 : 4);
    const int64_t threads = cuda_ceil(vectors > 0 ? vectors : 1, MD_WARP) * MD_WARP;
    const int64_t fit = MD_MIN(BWD_THREADS / threads, BWD_PER_SM), per_sm = MD_MAX(fit, 1);
    return cuda_chunks(md_tensor_rows(dx), BWD_LEAST, per_sm * cuda_sms(be));
}

template <class T> struct ln_bwd_launch {
    static constexpr auto narrow =
        md_ln_bwd_rows<T, BWD_NARROW, BWD_NARROW_ROWS, BWD_NARROW_STAGES, false>;
    static constexpr auto narrow_all =
        md_ln_bwd_rows<T, BWD_NARROW, BWD_NARROW_ROWS, BWD_NARROW_STAGES, true>;
    static constexpr auto wide = md_ln_bwd_rows<T, LN_BLOCK, BWD_WIDE_ROWS, BWD_WIDE_STAGES, false>;

    static size_t smem(int threads)
    {
        const bool fits = threads <= BWD_NARROW;
        const int rows = fits ? BWD_NARROW_ROWS : BWD_WIDE_ROWS;
        const int stages = fits ? BWD_NARROW_STAGES : BWD_WIDE_STAGES;
        return (size_t)BWD_ROW_SUMS(rows, threads) +
               (size_t)(stages * BWD_OPERANDS * rows * threads) * sizeof(uint4);
    }
};

template <class T> md_status allow_smem(void)
{
    typedef ln_bwd_launch<T> l;
    MD_TRY(cuda_ok(MD_ALLOW_SMEM(l::narrow, l::smem(BWD_NARROW)), "shared memory"));
    MD_TRY(cuda_ok(MD_ALLOW_SMEM(l::narrow_all, l::smem(BWD_NARROW)), "shared memory"));
    return cuda_ok(MD_ALLOW_SMEM(l::wide, l::smem(LN_BLOCK)), "shared memory");
}

template <class T>
md_status bwd_operands(const md_residual_ln_bwd_args *a, float *part, md_ln_bwd<T> &k)
{
    k.r = cuda_data<T>(a->r);
    k.branch = a->dgamma ? cuda_data<T>(a->branch) : nullptr;
    k.dr = cuda_data<T>(a->dr);
    k.dy = cuda_data<T>(a->dy);
    k.gamma = cuda_data<float>(a->gamma);
    k.weight = cuda_data<float>(a->weight);
    k.mean = cuda_data<float>(a->mean);
    k.rstd = cuda_data<float>(a->rstd);
    k.dx = cuda_data<T>(a->dx);
    k.dbranch = cuda_data<T>(a->dbranch);
    k.part = part;
    MD_TRY(ln_images(MD_OP_residual_ln_bwd, a->keep, a->from, a->to, a->dx, &k.images));
    k.rows = (int)md_tensor_rows(a->dx);
    k.cols = (int)md_tensor_cols(a->dx);
    k.per_col = 1.0f / (float)k.cols;
    return MD_OK;
}

template <class T>
md_status bwd_run(md_backend *be, const md_residual_ln_bwd_args *a, int64_t chunks, float *part)
{
    md_ln_bwd<T> k = {};
    MD_TRY(bwd_operands(a, part, k));
    const int threads = ln_threads<T>(
        k.cols, cuda_aligned(k.r, k.branch, k.dr, k.dy, k.dx, k.dbranch, k.gamma, k.weight));
    typedef ln_bwd_launch<T> l;
    const bool all = k.dr && k.branch && k.dy && k.dbranch && k.part;
    if (threads == 0)
        MD_LAUNCH(md_ln_bwd_any<T>, (unsigned)chunks, VEC_BLOCK, 2 * 2 * VEC_WARPS * sizeof(float),
                  cuda_stream(be), k);
    else if (threads <= BWD_NARROW)
        MD_LAUNCH((all ? l::narrow_all : l::narrow), (unsigned)chunks, (unsigned)threads,
                  l::smem(threads), cuda_stream(be), k);
    else
        MD_LAUNCH(l::wide, (unsigned)chunks, (unsigned)threads, l::smem(threads), cuda_stream(be),
                  k);
    return cuda_launched(MD_OP_residual_ln_bwd);
}

md_status bwd_check(const md_residual_ln_bwd_args *a)
{
    CUDA_CHECK(residual_ln_bwd, a);
    if ((!a->dr && !a->dy) || (a->dy && (!a->r || !a->mean || !a->rstd)) ||
        (a->dgamma && (!a->branch || !a->gamma)) || ((a->dweight || a->dbias) && !a->dy) ||
        (a->dbranch_sum && !a->dbranch) || (a->accumulate & 3))
        MD_FAIL(MD_ERR_BUG, "residual_ln_bwd: this set of operands makes no sense");
    return MD_OK;
}

} // namespace

md_status cuda_norm_setup(void)
{
    MD_TRY(allow_smem<float>());
    return allow_smem<md_bf16>();
}

size_t cuda_residual_ln_bwd_scratch(md_backend *be, const md_residual_ln_bwd_args *a)
{
    const int64_t part = bwd_chunks(be, a->dx) * md_tensor_cols(a->dx);
    return wants_sums(a) ? sizeof(float) * BWD_SUMS * (size_t)part : 0;
}

md_status cuda_residual_ln_bwd(md_backend *be, const md_residual_ln_bwd_args *a)
{
    MD_TRY(bwd_check(a));
    void *scratch;
    MD_TRY(cuda_scratch(be, MD_OP_residual_ln_bwd, cuda_residual_ln_bwd_scratch(be, a), &scratch));
    if (md_tensor_cols(a->dx) == 0)
        return MD_OK;
    cuda_sums sums = {};
    sums.part = wants_sums(a) ? static_cast<float *>(scratch) : nullptr;
    sums.chunks = bwd_chunks(be, a->dx);
    sums.width = md_tensor_cols(a->dx);
    md_tensor *const out[BWD_SUMS] = {a->dgamma, a->dweight, a->dbias, a->dbranch_sum};
    for (int s = 0; s < BWD_SUMS; s++) {
        sums.out[s] = cuda_data<float>(out[s]);
        sums.accumulate[s] = a->accumulate >> (2 + s) & 1;
    }
    float *part = const_cast<float *>(sums.part);
    MD_TRY(cuda_is_bf16(a->dx) ? bwd_run<md_bf16>(be, a, sums.chunks, part)
                               : bwd_run<float>(be, a, sums.chunks, part));
    return cuda_reduce_sums(be, MD_OP_residual_ln_bwd, &sums);
}
