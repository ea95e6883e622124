/* kernels.c - the few PyTorch kernels whose effect fakecuda reproduces (FAKECUDA_KERNELS=emulate).
 *
 * What a weight loader meets: fill_/zero_ and copies that a plain memcpy cannot do, that is
 * a change of dtype between contiguous tensors, and a strided copy of one dtype.  A kernel is
 * recognised by its mangled name and its arguments are read by the layout that
 * aten/src/ATen/native/cuda/{Loops,CUDALoops,MemoryAccess,OffsetCalculator}.cuh give them.
 * That layout is private to PyTorch: everything read is checked (device pointers, sizes that
 * multiply to the element count), and what does not fit is refused, so that a PyTorch that
 * changed it makes launches fail rather than give wrong bytes.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "internal.h"

/* Size of the C++ type that the mangled text begins with; 0: unknown. */
static size_t type_size(const char *p)
{
    static const struct { const char *mangled; size_t n; } t[] = {
        {"f", 4}, {"d", 8}, {"l", 8}, {"m", 8}, {"i", 4}, {"j", 4}, {"s", 2}, {"t", 2},
        {"h", 1}, {"a", 1}, {"b", 1}, {"N3c108BFloat16E", 2}, {"N3c104HalfE", 2},
        {"N3c107complexIfE", 8}, {"N3c107complexIdE", 16}, {"N3c1013Float8_e4m3fnE", 1},
        {"N3c1011Float8_e5m2E", 1}, {"N3c1015Float8_e4m3fnuzE", 1},
        {"N3c1015Float8_e5m2fnuzE", 1}, {"N3c1014Float8_e8m0fnuE", 1},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++)
        if (!strncmp(p, t[i].mangled, strlen(t[i].mangled))) return t[i].n;
    return 0;
}

/* ---- dtype conversion, by c10::ScalarType number */

enum { BYTE, CHAR, SHORT, INT, LONG, HALF, FLOAT, DOUBLE, BOOL = 11, BF16 = 15, E5M2 = 23, E4M3FN };

static size_t dtype_size(int t)
{
    switch (t) {
    case BYTE: case CHAR: case BOOL: case E5M2: case E4M3FN: return 1;
    case SHORT: case HALF: case BF16: return 2;
    case INT: case FLOAT: return 4;
    case LONG: case DOUBLE: return 8;
    }
    return 0;
}

struct number { bool is_int; int64_t i; double d; };

static float bits_to_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static struct number load(int t, const char *p)
{
    struct number x = {.is_int = true};
    union { int8_t b; int16_t s; int32_t i; int64_t l; float f; double d; _Float16 h; uint16_t u; } v;
    memset(&v, 0, sizeof v);
    memcpy(&v, p, dtype_size(t));
    switch (t) {
    case BYTE: case BOOL: x.i = (uint8_t)v.b; return x;
    case CHAR: x.i = v.b; return x;
    case SHORT: x.i = v.s; return x;
    case INT: x.i = v.i; return x;
    case LONG: x.i = v.l; return x;
    }
    x.is_int = false;
    switch (t) {
    case HALF: x.d = v.h; break;
    case FLOAT: x.d = v.f; break;
    case DOUBLE: x.d = v.d; break;
    case BF16: x.d = bits_to_float((uint32_t)v.u << 16); break;
    case E5M2: v.u = (uint16_t)(v.u << 8); x.d = v.h; break; /* the upper half of a half */
    case E4M3FN: {
        int e = v.u >> 3 & 15, m = v.u & 7;
        if (e == 15 && m == 7) x.d = __builtin_nan("");
        else x.d = e ? (8 + m) * __builtin_ldexp(1, e - 10) : m * __builtin_ldexp(1, -9);
        if (v.u & 0x80) x.d = -x.d;
    }
    }
    return x;
}

static void store(int t, char *p, struct number x)
{
    int64_t i = x.is_int ? x.i : t < HALF ? (int64_t)x.d : 0;
    double d = x.is_int ? (double)x.i : x.d;
    float f = x.is_int ? (float)x.i : (float)x.d;
    _Float16 h = (_Float16)f;
    uint8_t b = x.is_int ? x.i != 0 : x.d != 0;
    uint32_t u;
    switch (t) {
    case BOOL: *p = (char)b; return;
    case DOUBLE: memcpy(p, &d, 8); return;
    case FLOAT: memcpy(p, &f, 4); return;
    case HALF: memcpy(p, &h, 2); return;
    case BF16:
        memcpy(&u, &f, 4);
        u = f != f ? 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16; /* to nearest, ties to even */
        memcpy(p, &u, 2);
        return;
    }
    memcpy(p, &i, dtype_size(t)); /* little-endian integers */
}

/* ---- what a recognised launch becomes */

#define MAX_DIMS 25
struct job {
    char *dst;
    const char *src;                    /* NULL: fill with value */
    int64_t n;
    size_t elem;                        /* for copies of one dtype and fills */
    int src_type, dst_type;             /* for conversions */
    int dims;                           /* 0: contiguous */
    uint32_t size[MAX_DIMS], dstride[MAX_DIMS], sstride[MAX_DIMS]; /* in bytes, fastest first */
    char value[16];
};

static void run_job(void *arg)
{
    struct job *j = arg;
    if (j->dims) {
        for (int64_t i = 0; i < j->n; i++) {
            size_t d = 0, s = 0;
            uint64_t rest = (uint64_t)i;
            for (int k = 0; k < j->dims; k++) {
                d += rest % j->size[k] * j->dstride[k];
                s += rest % j->size[k] * j->sstride[k];
                rest /= j->size[k];
            }
            memcpy(j->dst + d, j->src ? j->src + s : j->value, j->elem);
        }
    } else if (!j->src) {
        for (int64_t i = 0; i < j->n; i++) memcpy(j->dst + i * j->elem, j->value, j->elem);
    } else {
        size_t d = dtype_size(j->dst_type), s = dtype_size(j->src_type);
        for (int64_t i = 0; i < j->n; i++)
            store(j->dst_type, j->dst + i * d, load(j->src_type, j->src + i * s));
    }
}

static void add_range(struct fc_kernel_plan *plan, const void *p, size_t n, bool write)
{
    plan->range[plan->nranges].p = p;
    plan->range[plan->nranges].n = n;
    plan->range[plan->nranges++].write = write;
}

/* Turn the device pointers and spans of a job into host ones and accept it. */
static bool finish(struct job *j, struct fc_kernel_plan *plan, char *dst, const char *src)
{
    size_t dspan = j->n * (j->elem ? j->elem : dtype_size(j->dst_type));
    size_t sspan = j->n * (j->elem ? j->elem : dtype_size(j->src_type));
    if (j->dims) {
        uint64_t product = 1;
        dspan = sspan = j->elem;
        for (int k = 0; k < j->dims; k++) {
            if (!j->size[k]) return false;
            product *= j->size[k];
            dspan += (size_t)(j->size[k] - 1) * j->dstride[k];
            sspan += (size_t)(j->size[k] - 1) * j->sstride[k];
        }
        if (product != (uint64_t)j->n) return false;
    }
    if (j->n <= 0 || !(j->dst = fc_device_bytes(dst, dspan))) return false;
    if (src && !(j->src = fc_device_bytes(src, sspan))) return false;
    struct job *copy = malloc(sizeof *copy);
    *copy = *j;
    plan->run = run_job;
    plan->arg = copy;
    add_range(plan, j->dst, dspan, true);
    if (src) add_range(plan, j->src, sspan, false);
    return true;
}

/* OffsetCalculator<nargs>: int dims; {uint32 divisor, m1, shift} sizes[25];
 * uint32 strides[25][nargs], in bytes.  Returns its size, 0 if it makes no sense. */
static size_t read_offsets(const char *p, int nargs, struct job *j)
{
    int32_t dims;
    memcpy(&dims, p, 4);
    if (dims < 1 || dims > MAX_DIMS) return 0;
    for (int k = 0; k < dims; k++) {
        const char *stride = p + 4 + 12 * MAX_DIMS + 4 * nargs * k;
        memcpy(&j->size[k], p + 4 + 12 * k, 4);
        memcpy(&j->dstride[k], stride, 4);
        if (nargs > 1) memcpy(&j->sstride[k], stride + 4, 4);
    }
    j->dims = dims;
    return 4 + 12 * MAX_DIMS + 4 * nargs * MAX_DIMS;
}

bool fc_plan_kernel(const char *name, void **args, struct fc_kernel_plan *plan)
{
    static const char vec[] = "_ZN2at6native29vectorized_elementwise_kernelI";
    static const char unrolled[] = "_ZN2at6native27unrolled_elementwise_kernelI";
    static const char legacy[] = "_ZN2at6native18elementwise_kernelI";
    static const char fill[] = "NS0_11FillFunctorI";
    struct job j = {0};
    char *data[2] = {0};
    int32_t n;
    const char *f, *l;

    bool is_vec = !strncmp(name, vec, sizeof vec - 1);
    bool is_unrolled = !strncmp(name, unrolled, sizeof unrolled - 1);
    bool is_legacy = !strncmp(name, legacy, sizeof legacy - 1);
    if (!is_vec && !is_unrolled && !is_legacy) return false;
    memcpy(&n, args[0], 4);
    j.n = n;

    if (is_vec && (f = strstr(name, fill)) && strstr(name, "St5arrayIPcLm1EE")) {
        /* (int n, FillFunctor<T>{T}, array<char *, 1>) */
        if (!(j.elem = type_size(f + sizeof fill - 1))) return false;
        memcpy(j.value, args[1], j.elem);
        memcpy(data, args[2], sizeof *data);
        return finish(&j, plan, data[0], NULL);
    }
    if (is_vec && strstr(name, "St5arrayIPcLm2EE") && (strstr(name, "NS0_25bfloat16_copy_kernel_cudaE") ||
                                                        strstr(name, "NS0_24float16_copy_kernel_cudaE"))) {
        /* (int n, float -> half type, array<char *, 2>{out, in}) */
        if (!strstr(name, "EEUlfE_")) return false;
        memcpy(data, args[2], sizeof data);
        j.src_type = FLOAT;
        j.dst_type = strstr(name, "NS0_25bfloat16") ? BF16 : HALF;
        return finish(&j, plan, data[0], data[1]);
    }
    if (is_unrolled && strstr(name, "NS0_23direct_copy_kernel_cudaE") &&
        strstr(name, "St5arrayIPcLm2EE") && strstr(name, "12LoadWithCastILi1EE") &&
        strstr(name, "13StoreWithCastILi1EE")) {
        /* (int n, f, array<char *, 2>, in offsets, out offsets, LoadWithCast, StoreWithCast);
         * the last two hold an int8 dtype and, 4 bytes on, a uint32 element size. */
        uint32_t ss, ds;
        memcpy(data, args[2], sizeof data);
        j.src_type = *(int8_t *)args[5];
        j.dst_type = *(int8_t *)args[6];
        memcpy(&ss, (char *)args[5] + 4, 4);
        memcpy(&ds, (char *)args[6] + 4, 4);
        if (!dtype_size(j.src_type) || dtype_size(j.src_type) != ss || !dtype_size(j.dst_type) ||
            dtype_size(j.dst_type) != ds || j.dst_type == E5M2 || j.dst_type == E4M3FN)
            return false;
        return finish(&j, plan, data[0], data[1]);
    }
    if (is_legacy && strstr(name, "NS0_22gpu_kernel_impl_nocastI")) {
        /* (int n, lambda that captured {OffsetCalculator, array<char *, N> data, f}) */
        const char *closure = args[1];
        size_t at;
        if ((f = strstr(name, fill))) {
            if (!(j.elem = type_size(f + sizeof fill - 1)) || !(at = read_offsets(closure, 1, &j)))
                return false;
            at = (at + 7) / 8 * 8;
            memcpy(data, closure + at, 8);
            memcpy(j.value, closure + at + 8, j.elem);
            return finish(&j, plan, data[0], NULL);
        }
        if ((f = strstr(name, "23direct_copy_kernel_cudaE")) && (l = strstr(f, "EUl"))) {
            if (!(j.elem = type_size(l + 3)) || !(at = read_offsets(closure, 2, &j))) return false;
            memcpy(data, closure + (at + 7) / 8 * 8, 16);
            return finish(&j, plan, data[0], data[1]);
        }
    }
    return false;
}
