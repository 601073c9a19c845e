/* cuda_optim: adamw, and the plain vector ops qv_bias, axpy and cast. */
#include "kernels/cuda/cuda_vec.cuh"

namespace
{

/* 30 bytes of traffic per element with the copy, 28 without. */
struct md_adamw_pass {
    md_adamw_coef coef;
    const float *grad;
    float *param, *m, *v;
    md_bf16 *copy;

    template <int W> struct data {
        float grad[W], param[W], m[W], v[W];
    };
    template <int W> MD_DEV void load(data<W> &d, int64_t i) const
    {
        md_get(grad + i, d.grad);
        md_get(param + i, d.param);
        md_get(m + i, d.m);
        md_get(v + i, d.v);
    }
    template <int W> MD_DEV void store(data<W> &d, int64_t i) const
    {
#pragma unroll
        for (int j = 0; j < W; j++)
            md_adamw_one(&coef, d.grad[j], &d.param[j], &d.m[j], &d.v[j]);
        md_put(param + i, d.param);
        md_put(m + i, d.m);
        md_put(v + i, d.v);
        if (copy)
            md_put(copy + i, d.param);
    }
};

/* [q, 0, v], c elements each. */
template <class T> struct md_qv_bias_pass {
    const T *q, *v;
    T *y;
    int64_t c;

    template <int W> struct data {
        float x[W];
    };
    template <int W> MD_DEV void load(data<W> &d, int64_t i) const
    {
        if (i < c || i >= 2 * c) {
            md_get(i < c ? q + i : v + i - 2 * c, d.x);
        } else {
#pragma unroll
            for (int j = 0; j < W; j++)
                d.x[j] = 0.0f;
        }
    }
    template <int W> MD_DEV void store(data<W> &d, int64_t i) const
    {
        md_put(y + i, d.x);
    }
};

template <class T, bool ADD> struct md_axpy_pass {
    const T *x;
    T *y;
    float alpha;

    template <int W> struct data {
        float x[W], y[W];
    };
    template <int W> MD_DEV void load(data<W> &d, int64_t i) const
    {
        md_get(x + i, d.x);
        if (ADD)
            md_get(y + i, d.y);
    }
    template <int W> MD_DEV void store(data<W> &d, int64_t i) const
    {
#pragma unroll
        for (int j = 0; j < W; j++)
            d.x[j] = ADD ? d.y[j] + alpha * d.x[j] : alpha * d.x[j];
        md_put(y + i, d.x);
    }
};

template <class From, class To> struct md_cast_pass {
    const From *x;
    To *y;

    template <int W> struct data {
        float x[W];
    };
    template <int W> MD_DEV void load(data<W> &d, int64_t i) const
    {
        md_get(x + i, d.x);
    }
    template <int W> MD_DEV void store(data<W> &d, int64_t i) const
    {
        md_put(y + i, d.x);
    }
};

template <class T> md_status qv_bias_run(md_backend *be, const md_qv_bias_args *a)
{
    enum { N = md_vec<T>::N };
    md_qv_bias_pass<T> k;
    k.q = cuda_data<T>(a->q);
    k.v = cuda_data<T>(a->v);
    k.y = cuda_data<T>(a->y);
    k.c = md_tensor_count(a->q);
    return cuda_each<N>(be, MD_OP_qv_bias, k, 3 * k.c, k.c % N == 0 && cuda_aligned(k.q, k.v, k.y));
}

template <class T, bool ADD> md_status axpy_run(md_backend *be, const md_axpy_args *a)
{
    md_axpy_pass<T, ADD> k;
    k.x = cuda_data<T>(a->x);
    k.y = cuda_data<T>(a->y);
    k.alpha = a->alpha;
    return cuda_each<md_vec<T>::N>(be, MD_OP_axpy, k, md_tensor_count(a->x),
                                   cuda_aligned(k.x, k.y));
}

template <class From, class To> md_status cast_run(md_backend *be, const md_cast_args *a)
{
    md_cast_pass<From, To> k;
    k.x = cuda_data<From>(a->x);
    k.y = cuda_data<To>(a->y);
    return cuda_each<8>(be, MD_OP_cast, k, md_tensor_count(a->x), cuda_aligned(k.x, k.y));
}

} // namespace

md_status cuda_adamw(md_backend *be, const md_adamw_args *a)
{
    CUDA_CHECK(adamw, a);
    if (a->step < 1)
        MD_FAIL(MD_ERR_BUG, "adamw: step %lld, the first one is 1", (long long)a->step);
    const double t = (double)a->step;
    md_adamw_pass k;
    k.coef.decay = (float)(1.0 - a->lr * a->weight_decay);
    k.coef.rest1 = (float)(1.0 - a->beta1);
    k.coef.beta2 = (float)a->beta2;
    k.coef.rest2 = (float)(1.0 - a->beta2);
    k.coef.step_size = (float)(a->lr / (1.0 - pow(a->beta1, t)));
    k.coef.root = (float)(1.0 / sqrt(1.0 - pow(a->beta2, t)));
    k.coef.eps = (float)a->eps;
    k.coef.grad_scale = (float)a->grad_scale;
    k.grad = cuda_data<float>(a->grad);
    k.param = cuda_data<float>(a->param);
    k.m = cuda_data<float>(a->m);
    k.v = cuda_data<float>(a->v);
    k.copy = cuda_data<md_bf16>(a->copy);
    return cuda_each<4>(be, MD_OP_adamw, k, md_tensor_count(a->grad),
                        cuda_aligned(k.grad, k.param, k.m, k.v, k.copy));
}

md_status cuda_qv_bias(md_backend *be, const md_qv_bias_args *a)
{
    CUDA_CHECK(qv_bias, a);
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "qv_bias: it does not accumulate");
    return cuda_is_bf16(a->y) ? qv_bias_run<md_bf16>(be, a) : qv_bias_run<float>(be, a);
}

md_status cuda_axpy(md_backend *be, const md_axpy_args *a)
{
    CUDA_CHECK(axpy, a);
    const bool add = a->accumulate & 1;
    if (cuda_is_bf16(a->x))
        return add ? axpy_run<md_bf16, true>(be, a) : axpy_run<md_bf16, false>(be, a);
    return add ? axpy_run<float, true>(be, a) : axpy_run<float, false>(be, a);
}

md_status cuda_cast(md_backend *be, const md_cast_args *a)
{
    CUDA_CHECK(cast, a);
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "cast: it does not accumulate");
    const bool from = cuda_is_bf16(a->x), to = cuda_is_bf16(a->y);
    if (from == to)
        return cuda_ok(cudaMemcpyAsync(a->y->data, a->x->data, md_tensor_bytes(a->x),
                                       cudaMemcpyDeviceToDevice, cuda_stream(be)),
                       "cast");
    return from ? cast_run<md_bf16, float>(be, a) : cast_run<float, md_bf16>(be, a);
}
