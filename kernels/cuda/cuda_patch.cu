/* cuda_patch: images to patches, mixed on the way where that is asked for. */
#include "kernels/cuda/cuda_vec.cuh"
#include "src/rng.h"

namespace
{

template <class T> struct md_patchify_pass {
    const uint8_t *image;
    const md_mix *mix;
    T *patch;
    int64_t strip; /* numbers of a strip of patches, side rows of an image */
    int image_side, side, grid;
    bool hwc;
    float mean[3], std[3];
};

/* The place of one number of a strip, and steps to the next. */
struct md_patch_at {
    int gx, ch, y, x;
};

MD_DEV md_patch_at md_patch_find(int i, int side, bool hwc)
{
    const int size = 3 * side * side, inner = i % size;
    md_patch_at p;
    p.gx = i / size;
    if (hwc) {
        p.ch = inner % 3;
        p.x = inner / 3 % side;
        p.y = inner / 3 / side;
    } else {
        p.x = inner % side;
        p.y = inner / side % side;
        p.ch = inner / side / side;
    }
    return p;
}

MD_DEV void md_patch_next(md_patch_at &p, int side, bool hwc)
{
    if (hwc) {
        if (++p.ch < 3)
            return;
        p.ch = 0;
        if (++p.x < side)
            return;
        p.x = 0;
        if (++p.y == side)
            p.y = 0, p.gx++;
    } else {
        if (++p.x < side)
            return;
        p.x = 0;
        if (++p.y < side)
            return;
        p.y = 0;
        if (++p.ch == 3)
            p.ch = 0, p.gx++;
    }
}

/* The value of every byte of every channel, made in f64 as on the cpu. */
template <class T> MD_DEV void md_byte_table(const md_patchify_pass<T> &k, float *table)
{
    for (int i = (int)threadIdx.x; i < 768; i += VEC_BLOCK) {
        const int ch = i / 256;
        const float mean = ch == 0 ? k.mean[0] : ch == 1 ? k.mean[1] : k.mean[2];
        const float std = ch == 0 ? k.std[0] : ch == 1 ? k.std[1] : k.std[2];
        table[i] = (float)(((double)(i % 256) / 255.0 - (double)mean) / (double)std);
    }
    md_barrier();
}

/* A block makes the patches of one strip (blockIdx.x), which follow each other in memory; a thread
 * W numbers at a time. */
template <class T, int W> MD_KERNEL(VEC_BLOCK) md_patchify(md_patchify_pass<T> k)
{
    float *table = reinterpret_cast<float *>(md_smem());
    md_byte_table(k, table);
    const uint8_t *image = k.image + (int64_t)blockIdx.x * k.side * k.image_side * 3;
    T *patch = k.patch + blockIdx.x * k.strip;
    for (int i = (int)threadIdx.x * W; i < k.strip; i += VEC_BLOCK * W) {
        md_patch_at p = md_patch_find(i, k.side, k.hwc);
        float x[W];
#pragma unroll
        for (int j = 0; j < W; j++) {
            const int64_t pixel = (int64_t)p.y * k.image_side + p.gx * k.side + p.x;
            x[j] = table[p.ch * 256 + image[pixel * 3 + p.ch]];
            md_patch_next(p, k.side, k.hwc);
        }
        md_put(patch + i, x);
    }
}

/* One colour of a pixel; `at` is its place in the image. */
struct md_colour {
    int x, y, ch, at;
};

/* It in an image with the record m. */
MD_DEV float md_erased(const md_mix &m, const uint8_t *image, const float *table, md_colour c)
{
    if (md_in_box(m.erase, c.x, c.y))
        return md_rng_normal(m.key, (uint32_t)c.at);
    return table[c.ch * 256 + image[c.at]];
}

/* The same with an md_mix of every image; those of the image and its partner lie behind the table.
 */
template <class T, int W> MD_KERNEL(VEC_BLOCK) md_patchify_mix(md_patchify_pass<T> k)
{
    float *table = reinterpret_cast<float *>(md_smem());
    md_mix *mix = reinterpret_cast<md_mix *>(table + 768);
    const int64_t image = blockIdx.x / k.grid, bytes = (int64_t)k.image_side * k.image_side * 3;
    if (threadIdx.x < 2)
        mix[threadIdx.x] = k.mix[threadIdx.x == 0 ? image : k.mix[image].partner];
    md_byte_table(k, table);
    const uint8_t *own = k.image + image * bytes, *partner = k.image + mix[0].partner * bytes;
    const float lambda = mix[0].lambda;
    const int top = (int)blockIdx.x % k.grid * k.side;
    T *patch = k.patch + blockIdx.x * k.strip;
    for (int i = (int)threadIdx.x * W; i < k.strip; i += VEC_BLOCK * W) {
        md_patch_at p = md_patch_find(i, k.side, k.hwc);
        float v[W];
#pragma unroll
        for (int j = 0; j < W; j++) {
            const int x = p.gx * k.side + p.x, y = top + p.y;
            const bool swapped = md_in_box(mix[0].box, x, y);
            const md_colour c = {x, y, p.ch, (y * k.image_side + x) * 3 + p.ch};
            v[j] = md_erased(mix[swapped], swapped ? partner : own, table, c);
            if (!swapped && lambda != 1.0f)
                v[j] = md_blend(lambda, v[j], md_erased(mix[1], partner, table, c));
            md_patch_next(p, k.side, k.hwc);
        }
        md_put(patch + i, v);
    }
}

template <class T, int W>
md_status patchify_launch(md_backend *be, int64_t strips, const md_patchify_pass<T> &k)
{
    const auto kernel = k.mix ? md_patchify_mix<T, W> : md_patchify<T, W>;
    const size_t smem = 768 * sizeof(float) + (k.mix ? 2 * sizeof(md_mix) : 0);
    MD_LAUNCH(kernel, (unsigned)strips, VEC_BLOCK, smem, cuda_stream(be), k);
    return cuda_launched(MD_OP_patchify);
}

template <class T> md_status patchify_run(md_backend *be, const md_patchify_args *a)
{
    const int64_t images = a->image->dim[0], side = a->image->dim[1];
    md_patchify_pass<T> k;
    k.image = cuda_data<uint8_t>(a->image);
    k.mix = cuda_data<md_mix>(a->mix);
    k.patch = cuda_data<T>(a->patch);
    k.image_side = (int)side;
    k.side = a->side;
    k.grid = (int)(side / a->side);
    k.strip = (int64_t)k.grid * 3 * a->side * a->side;
    k.hwc = a->order == MD_PATCH_HWC;
    for (int ch = 0; ch < 3; ch++) {
        k.mean[ch] = a->mean[ch];
        k.std[ch] = a->std[ch];
    }
    const int64_t strips = images * k.grid;
    if (strips == 0)
        return MD_OK;
    enum { W = md_vec<T>::N };
    return vec_width<T>(k.strip, cuda_aligned(k.patch)) == W ? patchify_launch<T, W>(be, strips, k)
                                                             : patchify_launch<T, 1>(be, strips, k);
}

} // namespace

md_status cuda_patchify(md_backend *be, const md_patchify_args *a)
{
    CUDA_CHECK(patchify, a);
    const int64_t s = a->image->dim[1], p = a->side, grid = p > 0 ? s / p : 0;
    if (p < 1 || s % p != 0 || md_tensor_rows(a->patch) != a->image->dim[0] * grid * grid ||
        md_tensor_cols(a->patch) != 3 * p * p || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "patchify: patches of side %d do not tile images of side %lld", a->side,
                (long long)s);
    return cuda_is_bf16(a->patch) ? patchify_run<md_bf16>(be, a) : patchify_run<float>(be, a);
}
