/* runtime.c - a stand-in for libcudart that needs no GPU.
 *
 * "Device memory" is host memory, a stream is a FIFO drained by a worker thread,
 * and an asynchronous copy really is carried out later, by that thread.  So code
 * that forgets to synchronise reads stale bytes here as it would on a GPU.
 *
 *   - A device pointer is an address range mapped PROT_NONE; the bytes live in a
 *     second ("shadow") mapping.  Host code that dereferences a device pointer
 *     therefore crashes, as it would with a real GPU.
 *   - Pinned memory is an anonymous mapping entered in the same region table, so
 *     is_pinned(), cudaHostRegister and copies from pageable memory behave alike.
 *   - Kernels are not executed.  By default a launch fails with an error naming the
 *     kernel, but for a few copy and fill kernels of PyTorch, whose effect is
 *     reproduced (see kernels.c).
 *
 * Locking: one mutex (g_mu) guards everything but the kernel-name table.  It is
 * dropped while a worker moves bytes or sleeps.  g_cv is broadcast at each
 * completion; each stream has its own condition for new work.
 *
 * Settings: FAKECUDA_* in the environment (table `settings` below), or at run time
 * through fakecuda_set().  Counters: fakecuda_stat().
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "internal.h"

#define API __attribute__((visibility("default")))
#define MAX_DEV 16
#define MAX_VC 512         /* streams the race checker can tell apart; torch makes 128 a device at once */
#define HISTORY 4096       /* accesses the race checker remembers */
#define GRANULE (2u << 20) /* what cudaMalloc is charged in */
#define STAGE (1u << 20)   /* staging buffer of a copy from pageable memory */

/* ------------------------------------------------------------------ settings */

enum { K_ERROR, K_SKIP, K_EMULATE };
enum { S_TIMED, S_LATE };

static struct {
    int64_t devices, mem, oom_bytes, malloc_fail_at, host_limit, register_limit;
    int64_t latency_us, jitter_us, seed, poison, log, check, kernels, schedule;
    int64_t fail_copy_at, fail_copy_async_at, corrupt_copy_at, fail_code, fail_kind;
    int64_t fail_min_bytes, hold_timeout_ms, strict;
    double gbps, gbps_d2h;
} cfg = {
    .devices = 1, .mem = 16LL << 30, .oom_bytes = -1, .host_limit = -1,
    .register_limit = -1, .latency_us = 300, .seed = 1, .poison = 0xDB,
    .kernels = K_EMULATE, .fail_code = 719, .fail_kind = -1, .hold_timeout_ms = 30000,
    .strict = 1,
};

struct word { const char *name; int64_t v; };
static const struct word kernel_words[] = {{"error", K_ERROR}, {"skip", K_SKIP},
                                           {"emulate", K_EMULATE}, {0, 0}};
static const struct word sched_words[] = {{"timed", S_TIMED}, {"late", S_LATE}, {0, 0}};
static const struct word off_words[] = {{"off", -1}, {0, 0}};
static const struct word dir_words[] = {{"h2d", H2D}, {"d2h", D2H}, {"d2d", D2D},
                                        {"h2h", H2H}, {"any", -1}, {0, 0}};

static const struct setting {
    const char *name;
    int64_t *i;
    double *d;
    const struct word *words;
} settings[] = {
    {"DEVICES", &cfg.devices, 0, 0},               /* how many devices there are */
    {"MEM", &cfg.mem, 0, 0},                       /* bytes on each; malloc fails past it */
    {"OOM_BYTES", &cfg.oom_bytes, 0, off_words},   /* malloc fails past it, mem_get_info silent */
    {"MALLOC_FAIL_AT", &cfg.malloc_fail_at, 0, 0}, /* the Nth cudaMalloc from now fails */
    {"HOST_LIMIT", &cfg.host_limit, 0, off_words}, /* cudaHostAlloc fails past it */
    {"REGISTER_LIMIT", &cfg.register_limit, 0, off_words}, /* cudaHostRegister likewise */
    {"GBPS", 0, &cfg.gbps, 0},                     /* H2D (and D2H) rate, 1e9 B/s; 0: unlimited */
    {"GBPS_D2H", 0, &cfg.gbps_d2h, 0},             /* D2H rate where it differs */
    {"LATENCY_US", &cfg.latency_us, 0, 0},         /* no operation starts sooner after its call */
    {"JITTER_US", &cfg.jitter_us, 0, 0},           /* random extra delay before an operation */
    {"SEED", &cfg.seed, 0, 0},                     /* of that */
    {"SCHEDULE", &cfg.schedule, 0, sched_words},   /* late: run only what somebody waits for */
    {"POISON", &cfg.poison, 0, off_words},         /* byte that fills fresh device memory */
    {"STRICT", &cfg.strict, 0, 0},                 /* 0: device memory is readable by the host */
    {"KERNELS", &cfg.kernels, 0, kernel_words},    /* error, emulate or skip */
    {"CHECK", &cfg.check, 0, 0},                   /* 1: look for races; see report() */
    {"LOG", &cfg.log, 0, 0},                       /* 1: errors and launches, 2: each operation */
    {"FAIL_COPY_AT", &cfg.fail_copy_at, 0, 0},     /* Nth copy from now: the call fails */
    {"FAIL_COPY_ASYNC_AT", &cfg.fail_copy_async_at, 0, 0}, /* ... fails later, and sticks */
    {"CORRUPT_COPY_AT", &cfg.corrupt_copy_at, 0, 0},       /* ... one byte is flipped */
    {"FAIL_CODE", &cfg.fail_code, 0, 0},           /* cudaError_t of the two failures */
    {"FAIL_KIND", &cfg.fail_kind, 0, dir_words},   /* which copies count: h2d d2h d2d any */
    {"FAIL_MIN_BYTES", &cfg.fail_min_bytes, 0, 0}, /* and how large they must be */
    {"HOLD_TIMEOUT_MS", &cfg.hold_timeout_ms, 0, 0}, /* a wait during a hold ends it after this */
};

/* --------------------------------------------------------------------- state */

struct stream;
struct region {
    uintptr_t base;
    size_t size, charged;
    enum { R_DEVICE = 1, R_HOST, R_REGISTERED, R_MANAGED } kind;
    int dev;
    unsigned flags;
    bool vmm; /* made by cuMemAddressReserve */
    char *shadow;
};

typedef uint64_t vclock[MAX_VC];

/* One cudaEventRecord: shared by the event, the queued operation and the waits. */
struct rec {
    int refs;
    bool done;
    int64_t t_ns;
    struct stream *stream;
    uint64_t seq;
    uint64_t *vc;
};

struct event { unsigned flags; struct rec *rec; };

enum opkind { O_COPY, O_MEMSET, O_RECORD, O_WAIT_REC, O_WAIT_SEQ, O_HOSTFN, O_CALLBACK, O_FUNC,
              O_NOP, O_FREE };
static const char *const op_names[] = {"copy", "memset", "record", "wait", "wait", "hostfn",
                                       "callback", "kernel", "kernel", "free"};

struct op {
    struct op *next;
    enum opkind kind;
    uint64_t seq;
    int64_t t_enq, t_start; /* when it was queued, and may start by LATENCY and JITTER */
    char *dst;
    const char *src;
    size_t width, height, dpitch, spitch; /* height rows of width bytes */
    enum dir dir;
    int value, elem;
    void *tmp;
    bool corrupt, hashed;
    uint64_t hash;
    cudaError_t fail;
    struct rec *rec;
    struct stream *ws;
    uint64_t wseq;
    union { cudaHostFn_t host; cudaStreamCallback_t cb; fc_kernel_fn kernel; } fn;
    void *arg;
    const char *name;
    size_t bytes;
};

struct stream {
    struct stream *next;
    int id, dev, priority, vci;
    unsigned flags;
    bool legacy, started, destroyed;
    struct op *head, *tail, *running;
    uint64_t enq, done, kick; /* sequence numbers; kick: run up to here when late */
    int64_t vtime;            /* when the last operation ended, by the clock of the model */
    pthread_cond_t wake;
    vclock vc;
};

static pthread_mutex_t g_mu = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t g_cv;
static pthread_once_t g_once = PTHREAD_ONCE_INIT;
static struct stream *g_streams;
static int g_stream_ids;
static struct stream *g_legacy[MAX_DEV], *g_perthread[MAX_DEV];
static struct region **g_reg;
static size_t g_nreg, g_capreg;
static int64_t g_used[MAX_DEV], g_peak[MAX_DEV], g_host_used, g_host_peak, g_registered;
static int64_t g_busy[MAX_DEV][4]; /* when each copy engine is free again */
static _Atomic(cudaError_t) g_sticky; /* an asynchronous failure: all calls return it from then on */
static _Atomic bool g_touched, g_forked;
static int g_hold;
static int64_t g_violations;
static FILE *g_trace;
static unsigned g_rng;
static _Thread_local int t_dev;
static _Thread_local cudaError_t t_last;
static _Thread_local char t_msg[1024];
static _Thread_local enum cudaStreamCaptureMode t_capmode;

static struct {
    int64_t copies[4], bytes[4], busy_ns[4], memsets, launches, emulated, host_fns, mallocs,
        frees, host_allocs, host_frees, registers, unregisters, records, waits, syncs, device_syncs, queries,
        pageable, blocking_copies, copy_calls;
} st;

static struct { uintptr_t lo, hi; uint64_t seq; int vci, sid; bool write; const char *what; }
    g_hist[HISTORY];
static int g_nhist;
static vclock g_host_vc;

/* ----------------------------------------------------------------- utilities */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void sleep_until(int64_t t)
{
    struct timespec ts = {t / 1000000000LL, t % 1000000000LL};
    if (t > now_ns())
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR) {}
}

void fc_log(int level, const char *fmt, ...)
{
    if (cfg.log < level) return;
    char buf[1200];
    va_list ap;
    va_start(ap, fmt);
    int n = snprintf(buf, sizeof buf, "fakecuda: ");
    n += vsnprintf(buf + n, sizeof buf - n - 1, fmt, ap);
    va_end(ap);
    if (n > (int)sizeof buf - 2) n = sizeof buf - 2;
    buf[n++] = '\n';
    if (write(2, buf, n) < 0) {}
}

/* A violation: the program under test did something a GPU would punish only sometimes. */
static void report(const char *fmt, ...)
{
    char buf[900];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(buf, sizeof buf, fmt, ap);
    va_end(ap);
    g_violations++;
    fc_log(-1, "VIOLATION: %s", buf);
}

static int set_one(const struct setting *s, const char *v)
{
    for (const struct word *w = s->words; w && w->name; w++)
        if (!strcasecmp(w->name, v)) { *s->i = w->v; return 0; }
    char *end;
    if (s->d) { *s->d = strtod(v, &end); return end == v ? -1 : 0; }
    double x = strtod(v, &end);
    int64_t n = strtoll(v, NULL, 0);
    if (end == v) return -1;
    int64_t unit = 0;
    switch (toupper((unsigned char)*end)) {
    case 'K': unit = 1LL << 10; break;
    case 'M': unit = 1LL << 20; break;
    case 'G': unit = 1LL << 30; break;
    }
    *s->i = unit ? (int64_t)(x * unit) : n;
    return 0;
}

static void after_fork_child(void)
{
    /* The workers did not survive; CUDA itself cannot be used after a fork either. */
    g_forked = g_touched;
    pthread_mutex_init(&g_mu, NULL);
}

static void init_once(void)
{
    pthread_condattr_t a;
    pthread_condattr_init(&a);
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    pthread_cond_init(&g_cv, &a);
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        char key[64];
        snprintf(key, sizeof key, "FAKECUDA_%s", settings[i].name);
        const char *v = getenv(key);
        if (v && *v && set_one(&settings[i], v)) fc_log(-1, "bad value: %s=%s", key, v);
    }
    const char *vis = getenv("CUDA_VISIBLE_DEVICES");
    if (vis) {
        int n = 0;
        for (const char *p = vis; *p && *p != '-'; p++) n += (p == vis || p[-1] == ',');
        if (n < cfg.devices) cfg.devices = n;
    }
    if (cfg.devices > MAX_DEV) cfg.devices = MAX_DEV;
    const char *tr = getenv("FAKECUDA_TRACE"); /* a CSV line for each finished operation */
    if (tr && *tr && (g_trace = fopen(tr, "we"))) {
        setvbuf(g_trace, NULL, _IOLBF, 0);
        fputs("start_ns,end_ns,device,stream,what,dir,bytes,name\n", g_trace);
    }
    g_rng = (unsigned)cfg.seed;
    pthread_atfork(NULL, NULL, after_fork_child);
}

static void lock(void) { pthread_once(&g_once, init_once); pthread_mutex_lock(&g_mu); }
static void unlock(void) { pthread_mutex_unlock(&g_mu); }

static cudaError_t fail(cudaError_t e)
{
    if (e != cudaSuccess) {
        if (e != cudaErrorNotReady) t_last = e;
        fc_log(e == cudaErrorNotReady ? 3 : 2, "-> error %d", (int)e);
    }
    return e;
}

/* What every call does first.  Returns the error that makes it hopeless. */
static cudaError_t enter(void)
{
    pthread_once(&g_once, init_once);
    g_touched = true;
    if (g_forked) return cudaErrorInitializationError;
    if (cfg.devices == 0) return cudaErrorNoDevice;
    return g_sticky;
}
#define ENTER() do { cudaError_t e_ = enter(); if (e_) return fail(e_); } while (0)

/* ------------------------------------------------------------------- regions */

static size_t reg_pos(uintptr_t p) /* how many regions begin at or before p */
{
    size_t lo = 0, hi = g_nreg;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (g_reg[mid]->base <= p) lo = mid + 1; else hi = mid;
    }
    return lo;
}

static struct region *reg_find(const void *ptr)
{
    uintptr_t p = (uintptr_t)ptr;
    size_t i = reg_pos(p);
    return i && p < g_reg[i - 1]->base + g_reg[i - 1]->size ? g_reg[i - 1] : NULL;
}

static void reg_add(struct region *r)
{
    if (g_nreg == g_capreg)
        g_reg = realloc(g_reg, (g_capreg = g_capreg ? 2 * g_capreg : 64) * sizeof *g_reg);
    size_t i = reg_pos(r->base);
    memmove(g_reg + i + 1, g_reg + i, (g_nreg++ - i) * sizeof *g_reg);
    g_reg[i] = r;
}

static void reg_del(struct region *r)
{
    size_t i = reg_pos(r->base);
    memmove(g_reg + i - 1, g_reg + i, (g_nreg-- - i) * sizeof *g_reg);
    free(r);
}

/* Where the bytes at ptr are, and of what kind the memory is. */
struct place { char *at; bool device, pinned, managed; int dev; };

static cudaError_t place(const void *ptr, size_t n, struct place *out)
{
    struct region *r = reg_find(ptr);
    *out = (struct place){.at = (char *)ptr, .dev = -1};
    if (!r) return ptr ? cudaSuccess : cudaErrorInvalidValue;
    size_t off = (uintptr_t)ptr - r->base;
    if (n > r->size - off) return cudaErrorInvalidValue; /* runs over the end */
    out->dev = r->dev;
    if (r->kind == R_DEVICE) {
        out->device = true;
        out->at = r->shadow + off;
    } else {
        out->pinned = true;
        out->managed = r->kind == R_MANAGED;
    }
    return cudaSuccess;
}

char *fc_device_bytes(const void *ptr, size_t n) /* for kernels.c; g_mu is held */
{
    struct place p;
    return place(ptr, n, &p) == cudaSuccess && (p.device || p.pinned) ? p.at : NULL;
}

/* ------------------------------------------------------- race checker (CHECK) */

static void vc_join(uint64_t *a, const uint64_t *b)
{
    for (int i = 0; b && i < MAX_VC; i++) if (b[i] > a[i]) a[i] = b[i];
}

/* Enter an access by the operation just numbered s->enq, and compare it with those that
 * neither the host nor this stream has waited for. */
static void vc_access(struct stream *s, const void *p, size_t n, bool write, const char *what)
{
    if (!cfg.check || s->vci < 0 || !n) return;
    uintptr_t lo = (uintptr_t)p, hi = lo + n;
    int keep = 0;
    for (int i = 0; i < g_nhist; i++) {
        if (g_host_vc[g_hist[i].vci] >= g_hist[i].seq) continue; /* the host waited: forget */
        if (g_hist[i].lo < hi && lo < g_hist[i].hi && (write || g_hist[i].write) &&
            s->vc[g_hist[i].vci] < g_hist[i].seq)
            report("%s on stream %d (%s %zu bytes) is not ordered after %s on stream %d (%s) "
                   "of the same memory", what, s->id, write ? "writes" : "reads", n,
                   g_hist[i].what, g_hist[i].sid, g_hist[i].write ? "a write" : "a read");
        g_hist[keep++] = g_hist[i];
    }
    g_nhist = keep;
    if (g_nhist == HISTORY) memmove(g_hist, g_hist + 1, --g_nhist * sizeof *g_hist);
    g_hist[g_nhist].lo = lo;
    g_hist[g_nhist].hi = hi;
    g_hist[g_nhist].seq = s->enq;
    g_hist[g_nhist].vci = s->vci;
    g_hist[g_nhist].sid = s->id;
    g_hist[g_nhist].write = write;
    g_hist[g_nhist++].what = what;
}

/* 64-bit digest; four independent lanes so that it runs at memory speed. */
static uint64_t digest(const char *p, size_t n)
{
    uint64_t h[4] = {1, 2, 3, 4}, w[4];
    for (; n >= 32; p += 32, n -= 32) {
        memcpy(w, p, 32);
        for (int i = 0; i < 4; i++) h[i] = (h[i] ^ w[i]) * 0x9E3779B97F4A7C15ull;
    }
    for (; n; p++, n--) h[0] = (h[0] ^ (unsigned char)*p) * 0x9E3779B97F4A7C15ull;
    return (h[0] ^ h[0] >> 29) + 3 * (h[1] ^ h[1] >> 31) + 5 * (h[2] ^ h[2] >> 30) +
           7 * (h[3] ^ h[3] >> 28);
}

static uint64_t digest_op(const struct op *o)
{
    uint64_t h = 0;
    for (size_t r = 0; r < o->height; r++) h = h * 31 + digest(o->src + r * o->spitch, o->width);
    return h;
}

/* -------------------------------------------------------------------- streams */

static struct stream *stream_new(int dev, unsigned flags, int priority)
{
    struct stream *s = calloc(1, sizeof *s);
    s->dev = dev;
    s->flags = flags;
    s->priority = priority;
    s->id = g_stream_ids++;
    s->vci = s->id < MAX_VC ? s->id : -1;
    pthread_cond_init(&s->wake, NULL);
    s->next = g_streams;
    g_streams = s; /* structs of destroyed streams are never freed: records point to them */
    return s;
}

static struct stream *stream_get(cudaStream_t h)
{
    if (h == NULL || h == cudaStreamLegacy || h == cudaStreamPerThread) {
        struct stream **slot = h == cudaStreamPerThread ? &g_perthread[t_dev] : &g_legacy[t_dev];
        if (!*slot) {
            *slot = stream_new(t_dev, 0, 0);
            (*slot)->legacy = h != cudaStreamPerThread;
        }
        return *slot;
    }
    for (struct stream *s = g_streams; s; s = s->next)
        if ((void *)s == (void *)h) return s->destroyed ? NULL : s;
    return NULL;
}
#define GET_STREAM(s, h) \
    struct stream *s = stream_get(h); \
    if (!s) { unlock(); return fail(cudaErrorInvalidResourceHandle); }

static void kick(struct stream *s, uint64_t seq)
{
    if (seq > s->kick) {
        s->kick = seq;
        pthread_cond_signal(&s->wake);
    }
}

static void wake_all(void)
{
    for (struct stream *s = g_streams; s; s = s->next) pthread_cond_signal(&s->wake);
    pthread_cond_broadcast(&g_cv);
}

/* Wait for a completion.  A hold that would make this last for ever is ended. */
static void wait_cv(void)
{
    if (!g_hold) {
        pthread_cond_wait(&g_cv, &g_mu);
        return;
    }
    int64_t t = now_ns() + cfg.hold_timeout_ms * 1000000;
    struct timespec ts = {t / 1000000000LL, t % 1000000000LL};
    if (pthread_cond_timedwait(&g_cv, &g_mu, &ts) == ETIMEDOUT && g_hold) {
        fc_log(-1, "the hold ends: somebody has waited for it for %lld ms",
               (long long)cfg.hold_timeout_ms);
        g_hold = 0;
        wake_all();
    }
}

static void wait_seq(struct stream *s, uint64_t seq)
{
    kick(s, seq);
    while (s->done < seq) wait_cv();
}

static void wait_rec(struct rec *r)
{
    kick(r->stream, r->seq);
    while (!r->done) wait_cv();
}

static void sync_stream(struct stream *s)
{
    uint64_t seq = s->enq;
    vclock vc;
    memcpy(vc, s->vc, sizeof vc);
    wait_seq(s, seq);
    vc_join(g_host_vc, vc);
}

static void sync_device(int dev)
{
    /* Fixed targets first: work that others queue meanwhile isn't waited for. */
    for (struct stream *s = g_streams; s; s = s->next) if (s->dev == dev) kick(s, s->enq);
    for (struct stream *s = g_streams; s; s = s->next) if (s->dev == dev) sync_stream(s);
}

static void rec_unref(struct rec *r)
{
    if (r && --r->refs == 0) { free(r->vc); free(r); }
}

/* ---------------------------------------------------------------- the workers */

static void move_rows(struct op *o)
{
    if (o->height == 1 || (o->dpitch == o->width && o->spitch == o->width)) {
        memmove(o->dst, o->src, o->width * o->height);
    } else {
        for (size_t r = 0; r < o->height; r++)
            memmove(o->dst + r * o->dpitch, o->src + r * o->spitch, o->width);
    }
    if (o->corrupt) o->dst[o->width / 2] ^= 0x10;
}

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

/* Move the bytes; returns when the copy ended.  With GBPS set that is the end of the interval
 * which the copy has on its engine, reckoned from when it could start, so that the worker's
 * own lateness doesn't add up - unless this machine cannot keep up, see SLACK. */
#define SLACK 10000000
static int64_t exec_copy(struct stream *s, struct op *o)
{
    static _Atomic int64_t rate = 4000; /* bytes per us this machine copies at, measured */
    double g = o->dir == D2H && cfg.gbps_d2h > 0 ? cfg.gbps_d2h : cfg.gbps;
    int64_t end = 0, *busy = &g_busy[s->dev][o->dir]; /* one engine a direction for all streams */
    if (g > 0 && (o->dir == H2D || o->dir == D2H)) {
        lock();
        int64_t start = later(later(o->t_start, s->vtime), *busy);
        end = *busy = start + (int64_t)(o->bytes / g);
        unlock();
        /* The bytes move late in the interval, with some room for a slow machine. */
        sleep_until(end - (int64_t)(o->bytes * 2000 / rate));
    }
    if (o->hashed && digest_op(o) != o->hash) {
        lock();
        report("the host changed the %zu source bytes of a copy on stream %d before it was done",
               o->bytes, s->id);
        unlock();
    }
    int64_t t0 = now_ns();
    move_rows(o);
    int64_t dt = now_ns() - t0;
    if (o->bytes >= 1 << 20 && dt > 0) rate = (rate * 3 + (int64_t)(o->bytes * 1000 / dt)) / 4 + 1;
    if (!end) return now_ns();
    sleep_until(end);
    lock();
    end = later(end, now_ns() - SLACK);
    *busy = later(*busy, end);
    unlock();
    return end;
}

static void exec_memset(struct op *o)
{
    for (size_t r = 0; r < o->height; r++) {
        char *p = o->dst + r * o->dpitch;
        if (o->elem == 1) memset(p, o->value, o->width);
        else for (size_t i = 0; i + o->elem <= o->width; i += o->elem) memcpy(p + i, &o->value, o->elem);
    }
}

static void device_free(struct region *r);

/* Called and returns with g_mu held. */
static void exec(struct stream *s, struct op *o)
{
    int64_t t0 = now_ns(), vend = 0;
    o->t_start = o->t_enq + cfg.latency_us * 1000;
    if (cfg.jitter_us) o->t_start = later(o->t_start, t0) + rand_r(&g_rng) % (cfg.jitter_us * 1000 + 1);
    if (o->t_start > t0 && o->kind != O_WAIT_REC && o->kind != O_WAIT_SEQ) {
        unlock();
        sleep_until(o->t_start);
        lock();
        t0 = now_ns();
    }
    bool dead = g_sticky != cudaSuccess; /* after a fault nothing moves any more */
    if (o->fail && !dead) {
        g_sticky = o->fail;
        dead = true;
        fc_log(1, "injected: a copy of %zu bytes fails with %d", o->bytes, (int)o->fail);
    }
    switch (o->kind) {
    case O_COPY:
        if (!dead) { unlock(); vend = exec_copy(s, o); lock(); st.busy_ns[o->dir] += now_ns() - t0; }
        break;
    case O_MEMSET:
        if (!dead) { unlock(); exec_memset(o); lock(); }
        break;
    case O_WAIT_REC:
        wait_rec(o->rec);
        vend = later(s->vtime, o->rec->t_ns);
        break;
    case O_WAIT_SEQ:
        wait_seq(o->ws, o->wseq);
        vend = later(s->vtime, o->ws->vtime);
        break;
    case O_HOSTFN: unlock(); o->fn.host(o->arg); lock(); break;
    case O_CALLBACK: unlock(); o->fn.cb((cudaStream_t)s, g_sticky, o->arg); lock(); break;
    case O_FUNC:
        if (!dead) { unlock(); o->fn.kernel(o->arg); lock(); }
        break;
    case O_FREE: { struct region *r = reg_find(o->arg); if (r) device_free(r); } break;
    case O_RECORD:
        vend = o->rec->t_ns = later(s->vtime, o->t_start);
        o->rec->done = true;
        break;
    case O_NOP: break;
    }
    s->vtime = vend ? vend : now_ns();
    if (g_trace)
        fprintf(g_trace, "%lld,%lld,%d,%d,%s,%s,%zu,%s\n", (long long)t0, (long long)now_ns(),
                s->dev, s->id, op_names[o->kind], o->kind == O_COPY ? dir_words[o->dir].name : "",
                o->bytes, o->name ? o->name : "");
    fc_log(3, "stream %d done %s #%llu %zu bytes", s->id, op_names[o->kind],
           (unsigned long long)o->seq, o->bytes);
}

static void *worker(void *arg)
{
    struct stream *s = arg;
    lock();
    for (;;) {
        struct op *o = s->head;
        if (!o && s->destroyed) break;
        if (!o || g_hold || (cfg.schedule == S_LATE && s->kick < o->seq)) {
            pthread_cond_wait(&s->wake, &g_mu);
            continue;
        }
        s->running = o;
        exec(s, o);
        s->running = NULL;
        if (!(s->head = o->next)) s->tail = NULL;
        s->done = o->seq;
        pthread_cond_broadcast(&g_cv);
        rec_unref(o->rec);
        free(o->tmp);
        if (o->kind == O_FUNC) free(o->arg);
        free(o);
    }
    s->started = false;
    unlock();
    return NULL;
}

static struct op *op_new(enum opkind k)
{
    struct op *o = calloc(1, sizeof *o);
    o->kind = k;
    o->height = 1;
    return o;
}

static void append(struct stream *s, struct op *o)
{
    o->seq = ++s->enq;
    o->t_enq = now_ns();
    o->next = NULL;
    if (s->tail) s->tail->next = o; else s->head = o;
    s->tail = o;
    if (cfg.check) {
        vc_join(s->vc, g_host_vc);
        if (s->vci >= 0) s->vc[s->vci] = o->seq;
    }
    if (!s->started) {
        pthread_t t;
        pthread_attr_t a;
        pthread_attr_init(&a);
        pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
        s->started = true;
        if (pthread_create(&t, &a, worker, s)) { fc_log(-1, "no thread for a stream"); abort(); }
        pthread_attr_destroy(&a);
    }
    pthread_cond_signal(&s->wake);
}

static void append_wait(struct stream *s, struct stream *on)
{
    if (on == s || on->done == on->enq) return;
    struct op *w = op_new(O_WAIT_SEQ);
    w->ws = on;
    w->wseq = on->enq;
    append(s, w);
    vc_join(s->vc, on->vc);
}

/* Queue o on s, behind what the legacy default stream makes it wait for. */
static void enqueue(struct stream *s, struct op *o)
{
    if (s->legacy) {
        for (struct stream *t = g_streams; t; t = t->next)
            if (t->dev == s->dev && !(t->flags & cudaStreamNonBlocking)) append_wait(s, t);
    } else if (!(s->flags & cudaStreamNonBlocking) && g_legacy[s->dev]) {
        append_wait(s, g_legacy[s->dev]);
    }
    append(s, o);
}

/* Is queued or running work reading or writing these bytes? */
static bool in_flight(const char *p, size_t n, bool writes_only)
{
    for (struct stream *s = g_streams; s; s = s->next)
        for (struct op *o = s->head; o; o = o->next) {
            if (o->kind != O_COPY && o->kind != O_MEMSET) continue;
            size_t d = (o->height - 1) * o->dpitch + o->width;
            size_t r = (o->height - 1) * o->spitch + o->width;
            if (o->dst < p + n && p < o->dst + d) return true;
            if (!writes_only && o->kind == O_COPY && !o->tmp && o->src < p + n && p < o->src + r)
                return true;
        }
    return false;
}

/* --------------------------------------------------------------- device memory */

static char *map(size_t n, int prot)
{
    void *p = mmap(NULL, n, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static bool charge(int dev, size_t n)
{
    int64_t want = g_used[dev] + (int64_t)n;
    if (want > cfg.mem || (cfg.oom_bytes >= 0 && want > cfg.oom_bytes)) return false;
    g_used[dev] = want;
    if (want > g_peak[dev]) g_peak[dev] = want;
    return true;
}

static cudaError_t device_alloc(void **out, size_t size)
{
    *out = NULL;
    if (size == 0) return cudaSuccess;
    st.mallocs++;
    if (cfg.malloc_fail_at > 0 && --cfg.malloc_fail_at == 0) return cudaErrorMemoryAllocation;
    size_t n = round_up(size, 4096), charged = round_up(size, GRANULE);
    if (!charge(t_dev, charged)) return cudaErrorMemoryAllocation;
    struct region *r = calloc(1, sizeof *r);
    r->shadow = map(n, PROT_READ | PROT_WRITE);
    char *base = cfg.strict ? map(n, PROT_NONE) : r->shadow;
    if (!base || !r->shadow) {
        g_used[t_dev] -= charged;
        free(r);
        return cudaErrorMemoryAllocation;
    }
    if (cfg.poison >= 0) memset(r->shadow, (int)cfg.poison, n);
    r->base = (uintptr_t)base;
    r->size = n;
    r->charged = charged;
    r->kind = R_DEVICE;
    r->dev = t_dev;
    reg_add(r);
    *out = base;
    return cudaSuccess;
}

static void device_free(struct region *r)
{
    munmap(r->shadow, r->size);
    if ((char *)r->base != r->shadow) munmap((void *)r->base, r->size);
    g_used[r->dev] -= r->charged;
    st.frees++;
    reg_del(r);
}

API cudaError_t cudaMalloc(void **p, size_t n)
{
    ENTER();
    if (!p) return fail(cudaErrorInvalidValue);
    lock();
    cudaError_t e = device_alloc(p, n);
    unlock();
    fc_log(2, "cudaMalloc(%zu) = %p", n, *p);
    return fail(e);
}

API cudaError_t cudaFree(void *p)
{
    ENTER();
    if (!p) return cudaSuccess;
    lock();
    struct region *r = reg_find(p);
    if (!r || r->base != (uintptr_t)p || r->vmm || (r->kind != R_DEVICE && r->kind != R_MANAGED)) {
        unlock();
        return fail(cudaErrorInvalidValue);
    }
    sync_device(r->dev); /* cudaFree waits for the device */
    if ((r = reg_find(p))) device_free(r);
    unlock();
    return fail(g_sticky);
}

API cudaError_t cudaMallocManaged(void **p, size_t n, unsigned flags)
{
    ENTER();
    (void)flags;
    lock();
    int64_t strict = cfg.strict;
    cfg.strict = 0;
    cudaError_t e = device_alloc(p, n);
    cfg.strict = strict;
    if (e == cudaSuccess && *p) reg_find(*p)->kind = R_MANAGED;
    unlock();
    return fail(e);
}

API cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t h)
{
    (void)h;
    return cudaMalloc(p, n);
}

API cudaError_t cudaMallocFromPoolAsync(void **p, size_t n, cudaMemPool_t pool, cudaStream_t h)
{
    (void)pool;
    return cudaMallocAsync(p, n, h);
}

API cudaError_t cudaFreeAsync(void *p, cudaStream_t h)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    struct region *r = reg_find(p);
    if (!r || r->base != (uintptr_t)p || r->kind != R_DEVICE) {
        unlock();
        return fail(cudaErrorInvalidValue);
    }
    struct op *o = op_new(O_FREE);
    o->arg = p;
    enqueue(s, o);
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t *freeb, size_t *total)
{
    ENTER();
    lock();
    *total = cfg.mem;
    *freeb = cfg.mem > g_used[t_dev] ? cfg.mem - g_used[t_dev] : 0;
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p)
{
    ENTER();
    if (!a) return fail(cudaErrorInvalidValue);
    memset(a, 0, sizeof *a);
    lock();
    struct region *r = reg_find(p);
    a->type = cudaMemoryTypeUnregistered;
    a->device = cudaInvalidDeviceId;
    a->hostPointer = (void *)p;
    if (r) {
        a->device = r->dev;
        a->devicePointer = (void *)p;
        switch (r->kind) {
        case R_DEVICE: a->type = cudaMemoryTypeDevice; a->hostPointer = NULL; break;
        case R_MANAGED: a->type = cudaMemoryTypeManaged; break;
        default: a->type = cudaMemoryTypeHost;
        }
    }
    unlock();
    return cudaSuccess;
}

/* ----------------------------------------------------------------- host memory */

API cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags)
{
    ENTER();
    *p = NULL;
    if (n == 0) return cudaSuccess;
    size_t len = round_up(n, 4096);
    lock();
    st.host_allocs++;
    char *m = NULL;
    if (cfg.host_limit < 0 || g_host_used + (int64_t)len <= cfg.host_limit)
        m = map(len, PROT_READ | PROT_WRITE);
    if (m) {
        struct region *r = calloc(1, sizeof *r);
        *r = (struct region){.base = (uintptr_t)m, .size = len, .charged = len, .kind = R_HOST,
                             .dev = t_dev, .flags = flags};
        reg_add(r);
        g_host_used += len;
        if (g_host_used > g_host_peak) g_host_peak = g_host_used;
        *p = m;
    }
    unlock();
    fc_log(2, "cudaHostAlloc(%zu) = %p", n, *p);
    return fail(m ? cudaSuccess : cudaErrorMemoryAllocation);
}

API cudaError_t cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }

/* Freed or unregistered while the device still uses it: legal, as both calls wait, but a
 * program that relies on it has most likely lost track. */
static void host_gone(struct region *r, const char *what)
{
    if (cfg.check && in_flight((char *)r->base, r->size, false))
        report("%s of %zu bytes that queued copies still use", what, r->size);
    for (int d = 0; d < cfg.devices; d++) sync_device(d);
}

API cudaError_t cudaFreeHost(void *p)
{
    ENTER();
    if (!p) return cudaSuccess;
    lock();
    struct region *r = reg_find(p);
    if (!r || r->base != (uintptr_t)p || r->kind != R_HOST) {
        unlock();
        return fail(cudaErrorInvalidValue);
    }
    host_gone(r, "cudaFreeHost");
    st.host_frees++;
    g_host_used -= r->charged;
    munmap(p, r->size);
    reg_del(r);
    unlock();
    return cudaSuccess;
}

/* Is [lo, hi) mapped throughout, and writable if asked? */
static bool mapped(uintptr_t lo, uintptr_t hi, bool write)
{
    FILE *f = fopen("/proc/self/maps", "re");
    if (!f) return true;
    unsigned long a, b;
    char perm[8], line[8192];
    while (lo < hi && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%lx-%lx %7s", &a, &b, perm) != 3 || b <= lo) continue;
        if (a > lo || perm[0] != 'r' || (write && perm[1] != 'w')) break;
        lo = b;
    }
    fclose(f);
    return lo >= hi;
}

API cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags)
{
    ENTER();
    uintptr_t lo = (uintptr_t)p;
    if (!p || !n || !mapped(lo, lo + n, !(flags & cudaHostRegisterReadOnly)))
        return fail(cudaErrorInvalidValue);
    cudaError_t e = cudaSuccess;
    lock();
    size_t i = reg_pos(lo + n - 1);
    if (i && g_reg[i - 1]->base + g_reg[i - 1]->size > lo) {
        e = cudaErrorHostMemoryAlreadyRegistered;
    } else if (cfg.register_limit >= 0 && g_registered + (int64_t)n > cfg.register_limit) {
        e = cudaErrorMemoryAllocation;
    } else {
        struct region *r = calloc(1, sizeof *r);
        *r = (struct region){.base = lo, .size = n, .charged = n, .kind = R_REGISTERED,
                             .dev = t_dev, .flags = flags};
        reg_add(r);
        g_registered += n;
        st.registers++;
    }
    unlock();
    return fail(e);
}

API cudaError_t cudaHostUnregister(void *p)
{
    ENTER();
    lock();
    struct region *r = reg_find(p);
    if (!r || r->base != (uintptr_t)p || r->kind != R_REGISTERED) {
        unlock();
        return fail(cudaErrorHostMemoryNotRegistered);
    }
    host_gone(r, "cudaHostUnregister");
    st.unregisters++;
    g_registered -= r->charged;
    reg_del(r);
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaHostGetDevicePointer(void **d, void *p, unsigned flags)
{
    ENTER();
    (void)flags;
    lock();
    struct region *r = reg_find(p);
    unlock();
    if (!r || r->kind == R_DEVICE) return fail(cudaErrorInvalidValue);
    *d = p;
    return cudaSuccess;
}

API cudaError_t cudaHostGetFlags(unsigned *f, void *p)
{
    ENTER();
    lock();
    struct region *r = reg_find(p);
    if (r) *f = r->flags;
    unlock();
    return r && r->kind != R_DEVICE ? cudaSuccess : fail(cudaErrorInvalidValue);
}

/* ---------------------------------------------------------------------- copies */

static bool counts_down(int64_t *n) { return *n > 0 && --*n == 0; }

/* Everything copies end in.  blocking: the call returns when the bytes have arrived. */
static cudaError_t copy(void *dst, size_t dpitch, const void *src, size_t spitch, size_t width,
                        size_t height, enum cudaMemcpyKind kind, cudaStream_t h, bool blocking)
{
    ENTER();
    if (!width || !height) return cudaSuccess;
    if (height > 1 && (dpitch < width || spitch < width)) return fail(cudaErrorInvalidPitchValue);
    size_t dspan = (height - 1) * dpitch + width, sspan = (height - 1) * spitch + width;
    struct place d, f;
    lock();
    GET_STREAM(s, h);
    cudaError_t e = place(dst, dspan, &d);
    if (!e) e = place(src, sspan, &f);
    /* A wrong kind: plain host memory where the caller said device, or the reverse. */
    if (!e && kind != cudaMemcpyDefault) {
        bool dd = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
        bool fd = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
        if ((dd && !d.device && !d.pinned) || (!dd && d.device) ||
            (fd && !f.device && !f.pinned) || (!fd && f.device))
            e = cudaErrorInvalidValue;
    }
    if (e) {
        unlock();
        fc_log(1, "copy(%p <- %p, %zu x %zu, kind %d): invalid", dst, src, width, height, kind);
        return fail(e);
    }
    enum dir dir = d.device ? (f.device ? D2D : H2D) : f.device ? D2H : H2H;
    size_t bytes = width * height;
    st.copies[dir]++;
    st.bytes[dir] += bytes;
    st.copy_calls++;

    bool eligible = (cfg.fail_kind < 0 || cfg.fail_kind == (int)dir) &&
                    (int64_t)bytes >= cfg.fail_min_bytes;
    if (eligible && counts_down(&cfg.fail_copy_at)) {
        unlock();
        fc_log(1, "injected: the call for a copy of %zu bytes fails", bytes);
        return fail((cudaError_t)cfg.fail_code);
    }
    struct op *o = op_new(O_COPY);
    o->dst = d.at;
    o->src = f.at;
    o->width = width;
    o->height = height;
    o->dpitch = dpitch;
    o->spitch = spitch;
    o->dir = dir;
    o->bytes = bytes;
    if (eligible && counts_down(&cfg.fail_copy_async_at)) o->fail = (cudaError_t)cfg.fail_code;
    if (eligible && counts_down(&cfg.corrupt_copy_at)) o->corrupt = true;

    bool pageable_src = !f.device && !f.pinned, pageable_dst = !d.device && !d.pinned;
    if (pageable_src || pageable_dst) st.pageable++;
    if (pageable_dst) blocking = true; /* the call returns when the copy is complete */
    if (pageable_src && !blocking) {
        /* As the driver does it: wait for the stream, stage, and return when the source has
         * been read - though the last staged part need not have reached the device yet. */
        size_t tail = height == 1 && bytes > STAGE ? STAGE : bytes;
        sync_stream(s);
        if (bytes > tail) {
            struct op *b = op_new(O_COPY);
            *b = *o;
            b->width = b->bytes = bytes - tail;
            b->corrupt = false;
            o->fail = 0;
            enqueue(s, b);
            vc_access(s, b->dst, b->bytes, true, "a pageable copy");
            sync_stream(s);
            o->dst += bytes - tail;
            o->src += bytes - tail;
            o->width = o->bytes = tail;
        }
        if (tail == bytes && height > 1) {
            blocking = true;
        } else {
            o->tmp = malloc(tail);
            memcpy(o->tmp, o->src, tail);
            o->src = o->tmp;
        }
    } else if (cfg.check && !blocking && !f.device && !in_flight(o->src, sspan, true)) {
        o->hash = digest_op(o);
        o->hashed = true;
    }
    if (blocking) st.blocking_copies++;
    enqueue(s, o);
    static const char *const what[4] = {"an H2D copy", "a D2H copy", "a D2D copy", "an H2H copy"};
    if (!o->tmp) vc_access(s, o->src, sspan, false, what[dir]);
    vc_access(s, o->dst, (o->height - 1) * o->dpitch + o->width, true, what[dir]);
    fc_log(2, "copy %s %zu bytes on stream %d%s", dir_words[dir].name, bytes, s->id,
           blocking ? ", blocking" : "");
    if (blocking) sync_stream(s);
    e = blocking ? g_sticky : cudaSuccess;
    unlock();
    return fail(e);
}

API cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k,
                                cudaStream_t h)
{
    return copy(d, n, s, n, n, 1, k, h, false);
}

API cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k)
{
    struct place a, b; /* device to device doesn't wait */
    lock();
    bool dd = place(d, n, &a) == 0 && place(s, n, &b) == 0 && a.device && b.device;
    unlock();
    return copy(d, n, s, n, n, 1, k, NULL, !dd);
}

API cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w,
                                  size_t h, enum cudaMemcpyKind k, cudaStream_t st_)
{
    return copy(d, dp, s, sp, w, h, k, st_, false);
}

API cudaError_t cudaMemcpy2D(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h,
                             enum cudaMemcpyKind k)
{
    return copy(d, dp, s, sp, w, h, k, NULL, true);
}

API cudaError_t cudaMemcpyPeerAsync(void *d, int dd, const void *s, int sd, size_t n,
                                    cudaStream_t h)
{
    (void)dd;
    (void)sd;
    return copy(d, n, s, n, n, 1, cudaMemcpyDefault, h, false);
}

API cudaError_t cudaMemcpyPeer(void *d, int dd, const void *s, int sd, size_t n)
{
    return cudaMemcpyPeerAsync(d, dd, s, sd, n, NULL);
}

static cudaError_t set_bytes(void *p, size_t pitch, int v, int elem, size_t w, size_t rows,
                             cudaStream_t h)
{
    ENTER();
    if (!w || !rows) return cudaSuccess;
    struct place d;
    lock();
    GET_STREAM(s, h);
    size_t span = (rows - 1) * pitch + w;
    cudaError_t e = place(p, span, &d);
    if (!e && !d.device && !d.pinned) e = cudaErrorInvalidValue;
    if (e) { unlock(); return fail(e); }
    struct op *o = op_new(O_MEMSET);
    o->dst = d.at;
    o->width = w;
    o->height = rows;
    o->dpitch = pitch;
    o->value = v;
    o->elem = elem;
    o->bytes = w * rows;
    st.memsets++;
    enqueue(s, o);
    vc_access(s, o->dst, span, true, "a memset");
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t h)
{
    return set_bytes(p, n, v, 1, n, 1, h);
}

API cudaError_t cudaMemset(void *p, int v, size_t n) { return set_bytes(p, n, v, 1, n, 1, NULL); }

API cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int v, size_t w, size_t h, cudaStream_t s)
{
    return set_bytes(p, pitch, v, 1, w, h, s);
}

/* ---------------------------------------------------------- streams and events */

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int prio)
{
    ENTER();
    lock();
    *out = (cudaStream_t)stream_new(t_dev, flags, prio > 0 ? 0 : prio < -5 ? -5 : prio);
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    return cudaStreamCreateWithPriority(out, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t *out)
{
    return cudaStreamCreateWithPriority(out, 0, 0);
}

API cudaError_t cudaStreamDestroy(cudaStream_t h)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    s->destroyed = true; /* what is queued still runs */
    kick(s, s->enq);
    pthread_cond_signal(&s->wake);
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t h)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    st.syncs++;
    if (s->legacy) {
        for (struct stream *t = g_streams; t; t = t->next)
            if (t->dev == s->dev && !(t->flags & cudaStreamNonBlocking)) sync_stream(t);
    } else {
        sync_stream(s);
    }
    unlock();
    return fail(g_sticky);
}

API cudaError_t cudaStreamQuery(cudaStream_t h)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    st.queries++;
    bool done = s->done == s->enq;
    if (done) vc_join(g_host_vc, s->vc); else kick(s, s->enq);
    unlock();
    return fail(g_sticky ? g_sticky : done ? cudaSuccess : cudaErrorNotReady);
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t h, cudaEvent_t ev, unsigned flags)
{
    ENTER();
    (void)flags;
    struct event *e = (struct event *)ev;
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    lock();
    GET_STREAM(s, h);
    st.waits++;
    if (e->rec) {
        struct op *o = op_new(O_WAIT_REC);
        o->rec = e->rec;
        o->rec->refs++;
        enqueue(s, o);
        vc_join(s->vc, e->rec->vc);
    }
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t h, int *p)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    *p = s->priority;
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaStreamGetFlags(cudaStream_t h, unsigned *f)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    *f = s->flags;
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaStreamGetId(cudaStream_t h, unsigned long long *id)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    *id = s->id + 1;
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t h, enum cudaStreamCaptureStatus *c)
{
    (void)h;
    *c = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m)
{
    enum cudaStreamCaptureMode old = t_capmode;
    t_capmode = *m;
    *m = old;
    return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t h, cudaHostFn_t fn, void *arg)
{
    ENTER();
    lock();
    GET_STREAM(s, h);
    struct op *o = op_new(O_HOSTFN);
    o->fn.host = fn;
    o->arg = arg;
    st.host_fns++;
    enqueue(s, o);
    kick(s, o->seq); /* the host can watch for it by other means than CUDA's */
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t h, cudaStreamCallback_t fn, void *arg,
                                      unsigned flags)
{
    ENTER();
    (void)flags;
    lock();
    GET_STREAM(s, h);
    struct op *o = op_new(O_CALLBACK);
    o->fn.cb = fn;
    o->arg = arg;
    st.host_fns++;
    enqueue(s, o);
    kick(s, o->seq);
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    ENTER();
    struct event *e = calloc(1, sizeof *e);
    e->flags = flags;
    *out = (cudaEvent_t)e;
    return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }

API cudaError_t cudaEventDestroy(cudaEvent_t ev)
{
    struct event *e = (struct event *)ev;
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    lock();
    rec_unref(e->rec);
    unlock();
    free(e);
    return fail(g_sticky);
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t ev, cudaStream_t h, unsigned flags)
{
    ENTER();
    (void)flags;
    struct event *e = (struct event *)ev;
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    lock();
    GET_STREAM(s, h);
    st.records++;
    struct rec *r = calloc(1, sizeof *r);
    struct op *o = op_new(O_RECORD);
    r->refs = 2;
    r->stream = s;
    rec_unref(e->rec);
    e->rec = o->rec = r;
    enqueue(s, o);
    r->seq = o->seq;
    if (cfg.check) {
        r->vc = malloc(sizeof(vclock));
        memcpy(r->vc, s->vc, sizeof(vclock));
    }
    unlock();
    return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t ev, cudaStream_t h)
{
    return cudaEventRecordWithFlags(ev, h, 0);
}

API cudaError_t cudaEventQuery(cudaEvent_t ev)
{
    ENTER();
    struct event *e = (struct event *)ev;
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    lock();
    st.queries++;
    bool done = !e->rec || e->rec->done;
    if (!done) kick(e->rec->stream, e->rec->seq);
    else if (e->rec) vc_join(g_host_vc, e->rec->vc);
    unlock();
    return fail(g_sticky ? g_sticky : done ? cudaSuccess : cudaErrorNotReady);
}

API cudaError_t cudaEventSynchronize(cudaEvent_t ev)
{
    ENTER();
    struct event *e = (struct event *)ev;
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    lock();
    st.syncs++;
    struct rec *r = e->rec;
    if (r) {
        r->refs++;
        wait_rec(r);
        vc_join(g_host_vc, r->vc);
        rec_unref(r);
    }
    unlock();
    return fail(g_sticky);
}

API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
    ENTER();
    struct event *x = (struct event *)a, *y = (struct event *)b;
    cudaError_t e = cudaSuccess;
    lock();
    if (!x || !y || !x->rec || !y->rec || ((x->flags | y->flags) & cudaEventDisableTiming))
        e = cudaErrorInvalidResourceHandle;
    else if (!x->rec->done || !y->rec->done)
        e = cudaErrorNotReady;
    else
        *ms = (y->rec->t_ns - x->rec->t_ns) / 1e6f;
    unlock();
    return fail(e);
}

/* --------------------------------------------------------------------- devices */

API cudaError_t cudaGetDeviceCount(int *n)
{
    *n = 0;
    cudaError_t e = enter();
    if (e == cudaErrorNoDevice || e == cudaErrorInitializationError) return fail(e);
    *n = (int)cfg.devices;
    return cudaSuccess;
}

API cudaError_t cudaGetDevice(int *d)
{
    cudaError_t e = enter();
    if (e == cudaErrorNoDevice || e == cudaErrorInitializationError) return fail(e);
    *d = t_dev;
    return cudaSuccess;
}

API cudaError_t cudaSetDevice(int d)
{
    ENTER();
    if (d < 0 || d >= cfg.devices) return fail(cudaErrorInvalidDevice);
    t_dev = d;
    return cudaSuccess;
}

API cudaError_t cudaSetDeviceFlags(unsigned f) { (void)f; ENTER(); return cudaSuccess; }
API cudaError_t cudaGetDeviceFlags(unsigned *f) { ENTER(); *f = 0; return cudaSuccess; }

API cudaError_t cudaDeviceSynchronize(void)
{
    ENTER();
    lock();
    st.syncs++;
    st.device_syncs++;
    sync_device(t_dev);
    unlock();
    return fail(g_sticky);
}

API cudaError_t cudaDeviceReset(void) { return cudaDeviceSynchronize(); }

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d)
{
    cudaError_t e = enter();
    if (e == cudaErrorNoDevice || e == cudaErrorInitializationError) return fail(e);
    if (d < 0 || d >= cfg.devices) return fail(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "fakecuda (host memory, no GPU)");
    memcpy(p->uuid.bytes, "fakecuda-device", 15);
    p->uuid.bytes[15] = (char)d;
    p->totalGlobalMem = cfg.mem;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->reservedSharedMemPerBlock = 1 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->memPitch = 0x7fffffff;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->major = 9;
    p->minor = 0;
    p->textureAlignment = 512;
    p->multiProcessorCount = 132;
    p->canMapHostMemory = 1;
    p->concurrentKernels = 1;
    p->pciBusID = d + 1;
    p->asyncEngineCount = 3;
    p->unifiedAddressing = 1;
    p->memoryBusWidth = 5120;
    p->l2CacheSize = 50 << 20;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->streamPrioritiesSupported = 1;
    p->managedMemory = 1;
    p->computePreemptionSupported = 1;
    p->canUseHostPointerForRegisteredMem = 1;
    p->hostRegisterSupported = 1;
    p->hostRegisterReadOnlySupported = 0;
    p->memoryPoolsSupported = 1;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d)
{
    struct cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, d);
    if (e) return e;
    switch ((int)a) {
    case cudaDevAttrMaxThreadsPerBlock: *v = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *v = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *v = 64; break;
    case cudaDevAttrMaxGridDimX: *v = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor:
        *v = 65536; break;
    case cudaDevAttrClockRate: *v = 1980000; break;
    case cudaDevAttrMemoryClockRate: *v = 2619000; break;
    case cudaDevAttrMultiProcessorCount: *v = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *v = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = p.minor; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrL2CacheSize: *v = p.l2CacheSize; break;
    case cudaDevAttrGlobalMemoryBusWidth: *v = p.memoryBusWidth; break;
    case cudaDevAttrAsyncEngineCount: *v = 3; break;
    case cudaDevAttrPciBusId: *v = p.pciBusID; break;
    case cudaDevAttrCanMapHostMemory: case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels: case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem: case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported: case cudaDevAttrManagedMemory: *v = 1; break;
    default: *v = 0;
    }
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d)
{
    ENTER();
    snprintf(s, n, "0000:%02X:00.0", d + 1);
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER();
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b)
{
    ENTER();
    *can = a != b;
    return cudaSuccess;
}

API cudaError_t cudaDeviceEnablePeerAccess(int d, unsigned f)
{
    ENTER();
    (void)d;
    (void)f;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int d)
{
    ENTER();
    static char pools[MAX_DEV];
    if (d < 0 || d >= cfg.devices) return fail(cudaErrorInvalidDevice);
    *p = (cudaMemPool_t)&pools[d];
    return cudaSuccess;
}

API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v)
{
    (void)p; (void)a; (void)v;
    return cudaSuccess;
}

API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v)
{
    (void)p;
    bool is_int = a == cudaMemPoolReuseFollowEventDependencies ||
                  a == cudaMemPoolReuseAllowOpportunistic ||
                  a == cudaMemPoolReuseAllowInternalDependencies;
    memset(v, 0, is_int ? 4 : 8);
    return cudaSuccess;
}

API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { (void)p; (void)n; return cudaSuccess; }

API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t p, const struct cudaMemAccessDesc *d, size_t n)
{
    (void)p; (void)d; (void)n;
    return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
API cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

/* ---------------------------------------------------------------------- errors */

static const struct { cudaError_t e; const char *name, *text; } errors[] = {
#define E(n, t) {n, #n, t}
    E(cudaSuccess, "no error"),
    E(cudaErrorInvalidValue, "invalid argument"),
    E(cudaErrorMemoryAllocation, "out of memory"),
    E(cudaErrorInitializationError, "initialization error"),
    E(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    E(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    E(cudaErrorInvalidDevice, "invalid device ordinal"),
    E(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    E(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    E(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    E(cudaErrorSymbolNotFound, "named symbol not found"),
    E(cudaErrorNotReady, "device not ready"),
    E(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    E(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    E(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    E(cudaErrorLaunchFailure, "unspecified launch failure"),
    E(cudaErrorNotPermitted, "operation not permitted"),
    E(cudaErrorNotSupported, "operation not supported"),
    E(cudaErrorUnknown, "unknown error"),
#undef E
};

API const char *cudaGetErrorName(cudaError_t e)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].e == e) return errors[i].name;
    return "cudaErrorOther";
}

API const char *cudaGetErrorString(cudaError_t e)
{
    if (*t_msg && (e == cudaErrorNoKernelImageForDevice || e == cudaErrorNotSupported)) return t_msg;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].e == e) return errors[i].text;
    return "error of fakecuda without a text";
}

API cudaError_t cudaGetLastError(void)
{
    cudaError_t e = g_sticky ? g_sticky : t_last;
    t_last = cudaSuccess;
    return e;
}

API cudaError_t cudaPeekAtLastError(void) { return g_sticky ? g_sticky : t_last; }

/* The generated stubs end here. */
API int fakecuda_unsupported(const char *name)
{
    pthread_once(&g_once, init_once);
    fc_log(1, "%s is not supported", name);
    snprintf(t_msg, sizeof t_msg, "operation not supported (fakecuda does not provide %s)", name);
    return fail(cudaErrorNotSupported);
}

/* --------------------------------------------------------------------- kernels */

/* Host-side address of a kernel stub or variable -> its name; open addressing. */
struct sym { const void *key; const char *name; size_t size; void *mem; };
static struct sym *g_syms;
static size_t g_nsym, g_capsym;
static pthread_mutex_t g_sym_mu = PTHREAD_MUTEX_INITIALIZER;

static struct sym *sym_slot(struct sym *t, size_t cap, const void *key)
{
    size_t i = ((uintptr_t)key * 0x9E3779B97F4A7C15ull) >> 20 & (cap - 1);
    while (t[i].key && t[i].key != key) i = (i + 1) & (cap - 1);
    return &t[i];
}

static struct sym *sym_get(const void *key)
{
    pthread_mutex_lock(&g_sym_mu);
    struct sym *s = g_capsym ? sym_slot(g_syms, g_capsym, key) : NULL;
    pthread_mutex_unlock(&g_sym_mu);
    return s && s->key ? s : NULL;
}

static void sym_put(const void *key, const char *name, size_t size)
{
    pthread_mutex_lock(&g_sym_mu);
    if (2 * (g_nsym + 1) > g_capsym) {
        size_t cap = g_capsym ? 2 * g_capsym : 1 << 14;
        struct sym *t = calloc(cap, sizeof *t);
        for (size_t i = 0; i < g_capsym; i++)
            if (g_syms[i].key) *sym_slot(t, cap, g_syms[i].key) = g_syms[i];
        free(g_syms);
        g_syms = t;
        g_capsym = cap;
    }
    struct sym *s = sym_slot(g_syms, g_capsym, key);
    g_nsym += !s->key;
    *s = (struct sym){key, name, size, NULL};
    pthread_mutex_unlock(&g_sym_mu);
}

API void **__cudaRegisterFatBinary(void *fat)
{
    void **h = malloc(sizeof *h);
    *h = fat;
    return h;
}
API void __cudaRegisterFatBinaryEnd(void **h) { (void)h; }
API void __cudaUnregisterFatBinary(void **h) { free(h); }
API char __cudaInitModule(void **h) { (void)h; return 1; }

API void __cudaRegisterFunction(void **h, const char *host, char *dev, const char *name, int limit,
                                uint3 *a, uint3 *b, dim3 *c, dim3 *d, int *w)
{
    (void)h; (void)dev; (void)limit; (void)a; (void)b; (void)c; (void)d; (void)w;
    sym_put(host, name, 0);
}

API void __cudaRegisterVar(void **h, char *host, char *dev, const char *name, int ext, size_t size,
                           int constant, int global)
{
    (void)h; (void)dev; (void)ext; (void)constant; (void)global;
    sym_put(host, name, size);
}

API void __cudaRegisterManagedVar(void **h, void **host, char *dev, const char *name, int ext,
                                  size_t size, int constant, int global)
{
    __cudaRegisterVar(h, (char *)host, dev, name, ext, size, constant, global);
}

API cudaError_t cudaGetSymbolAddress(void **p, const void *symbol)
{
    ENTER();
    struct sym *s = sym_get(symbol);
    if (!s || !s->size) return fail(cudaErrorSymbolNotFound);
    lock();
    cudaError_t e = cudaSuccess;
    if (!s->mem) e = device_alloc(&s->mem, s->size);
    *p = s->mem;
    unlock();
    return fail(e);
}

API cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *src, size_t n, size_t off,
                                   enum cudaMemcpyKind k)
{
    void *p;
    cudaError_t e = cudaGetSymbolAddress(&p, symbol);
    return e ? e : cudaMemcpy((char *)p + off, src, n, k);
}

static _Thread_local struct { dim3 grid, block; size_t shmem; cudaStream_t s; } t_call[8];
static _Thread_local int t_ncall;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shmem, struct CUstream_st *s)
{
    if (t_ncall == 8) return 1;
    t_call[t_ncall].grid = grid;
    t_call[t_ncall].block = block;
    t_call[t_ncall].shmem = shmem;
    t_call[t_ncall++].s = s;
    return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shmem, void *s)
{
    if (!t_ncall) return fail(cudaErrorUnknown);
    t_ncall--;
    *grid = t_call[t_ncall].grid;
    *block = t_call[t_ncall].block;
    *shmem = t_call[t_ncall].shmem;
    *(cudaStream_t *)s = t_call[t_ncall].s;
    return cudaSuccess;
}

/* A readable kernel name; libstdc++ is in any process that launches C++ kernels. */
static void demangle(const char *name, char *out, size_t n)
{
    void *cxx = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    char *(*dm)(const char *, char *, size_t *, int *) =
        cxx ? (char *(*)(const char *, char *, size_t *, int *))dlsym(cxx, "__cxa_demangle") : NULL;
    int status = -1;
    char *d = dm ? dm(name, NULL, NULL, &status) : NULL;
    snprintf(out, n, "%s", status == 0 && d ? d : name);
    free(d);
}

static cudaError_t launch(const void *func, void **args, cudaStream_t h)
{
    ENTER();
    struct sym *k = sym_get(func);
    const char *name = k ? k->name : "(unregistered kernel)";
    char nice[800];
    if (cfg.log || cfg.kernels == K_ERROR) demangle(name, nice, sizeof nice);
    lock();
    st.launches++;
    struct stream *s = stream_get(h);
    cudaError_t e = s ? cudaSuccess : cudaErrorInvalidResourceHandle;
    struct fc_kernel_plan plan = {0};
    if (!e && cfg.kernels == K_EMULATE && fc_plan_kernel(name, args, &plan)) {
        struct op *o = op_new(O_FUNC);
        o->fn.kernel = plan.run;
        o->arg = plan.arg;
        o->name = name;
        st.emulated++;
        enqueue(s, o);
        for (int i = 0; i < plan.nranges; i++)
            vc_access(s, plan.range[i].p, plan.range[i].n, plan.range[i].write, "a kernel");
    } else if (!e && cfg.kernels == K_SKIP) {
        struct op *o = op_new(O_NOP);
        o->name = name;
        enqueue(s, o);
    } else if (!e) {
        e = cudaErrorNoKernelImageForDevice;
    }
    unlock();
    if (cfg.log) fc_log(1, "kernel %s%s", nice, e ? " REFUSED" : plan.run ? " emulated" : " skipped");
    if (e == cudaErrorNoKernelImageForDevice) {
        demangle(name, nice, sizeof nice);
        snprintf(t_msg, sizeof t_msg, "fakecuda executes no kernels, and this was launched: %s", nice);
    }
    return fail(e);
}

API cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **args, size_t m, cudaStream_t s)
{
    (void)g; (void)b; (void)m;
    return launch(f, args, s);
}

API cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **args, size_t m,
                                            cudaStream_t s)
{
    return cudaLaunchKernel(f, g, b, args, m, s);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args)
{
    return launch(f, args, c->stream);
}

API cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f)
{
    *k = (cudaKernel_t)f; /* a handle is the stub's address */
    return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **args, size_t m,
                                   cudaStream_t s)
{
    return cudaLaunchKernel((const void *)k, g, b, args, m, s);
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f)
{
    ENTER();
    (void)f;
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = 227 << 10;
    return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v)
{
    (void)f; (void)a; (void)v;
    ENTER();
    return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f,
                                                                       int bs, size_t m, unsigned fl)
{
    (void)f; (void)m; (void)fl;
    ENTER();
    *n = bs > 0 ? 2048 / bs : 0;
    if (*n > 32) *n = 32;
    return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int bs, size_t m)
{
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, bs, m, 0);
}

/* ------------------------------------------------- the driver API, what there is
 *
 * Reached through cudaGetDriverEntryPoint* and by way of our libcuda.so.1.  Only the
 * virtual-memory calls (PyTorch's expandable segments) do anything; what is not here
 * gets a function that returns CUDA_ERROR_NOT_SUPPORTED. */

static CUresult drv_unsupported(void)
{
    fc_log(1, "an unsupported driver function was called");
    return CUDA_ERROR_NOT_SUPPORTED;
}

struct vmm_handle { size_t size; int dev; };

static CUresult drv_MemGetAllocationGranularity(size_t *g, const CUmemAllocationProp *p, int opt)
{
    (void)p; (void)opt;
    *g = GRANULE;
    return CUDA_SUCCESS;
}

static CUresult drv_MemAddressReserve(CUdeviceptr *out, size_t n, size_t align, CUdeviceptr addr,
                                      unsigned long long flags)
{
    (void)align; (void)addr; (void)flags;
    char *shadow = map(n, PROT_NONE), *base = cfg.strict ? map(n, PROT_NONE) : shadow;
    if (!shadow || !base) return CUDA_ERROR_OUT_OF_MEMORY;
    struct region *r = calloc(1, sizeof *r);
    *r = (struct region){.base = (uintptr_t)base, .size = n, .kind = R_DEVICE, .dev = t_dev,
                         .vmm = true, .shadow = shadow};
    lock();
    reg_add(r);
    unlock();
    *out = (CUdeviceptr)base;
    return CUDA_SUCCESS;
}

static CUresult drv_MemAddressFree(CUdeviceptr p, size_t n)
{
    lock();
    struct region *r = reg_find((void *)p);
    bool ok = r && r->vmm && r->base == p && r->size == n;
    if (ok) {
        sync_device(r->dev);
        munmap(r->shadow, n);
        if ((char *)r->base != r->shadow) munmap((void *)p, n);
        reg_del(r);
    }
    unlock();
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult drv_MemCreate(CUmemGenericAllocationHandle *out, size_t n,
                              const CUmemAllocationProp *p, unsigned long long flags)
{
    (void)flags;
    int dev = p && p->location.type == CU_MEM_LOCATION_TYPE_DEVICE ? p->location.id : t_dev;
    lock();
    st.mallocs++;
    bool ok = !(cfg.malloc_fail_at > 0 && --cfg.malloc_fail_at == 0) && charge(dev, n);
    unlock();
    if (!ok) return CUDA_ERROR_OUT_OF_MEMORY;
    struct vmm_handle *h = malloc(sizeof *h);
    *h = (struct vmm_handle){n, dev};
    *out = (CUmemGenericAllocationHandle)(uintptr_t)h;
    return CUDA_SUCCESS;
}

static CUresult drv_MemRelease(CUmemGenericAllocationHandle x)
{
    struct vmm_handle *h = (struct vmm_handle *)(uintptr_t)x;
    lock();
    g_used[h->dev] -= h->size;
    unlock();
    free(h);
    return CUDA_SUCCESS;
}

/* Contents belong to the mapping here, not to the handle: mapping twice doesn't share. */
static CUresult vmm_remap(CUdeviceptr p, size_t n, int prot)
{
    lock();
    struct region *r = reg_find((void *)p);
    bool ok = r && r->vmm && n <= r->size - (p - r->base);
    if (ok) {
        char *at = r->shadow + (p - r->base);
        if (prot == PROT_NONE) sync_device(r->dev);
        ok = mmap(at, n, prot, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == at;
        if (ok && prot != PROT_NONE && cfg.poison >= 0) memset(at, (int)cfg.poison, n);
    }
    unlock();
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult drv_MemMap(CUdeviceptr p, size_t n, size_t off, CUmemGenericAllocationHandle h,
                           unsigned long long flags)
{
    (void)off; (void)h; (void)flags;
    return vmm_remap(p, n, PROT_READ | PROT_WRITE);
}
static CUresult drv_MemUnmap(CUdeviceptr p, size_t n) { return vmm_remap(p, n, PROT_NONE); }

static CUresult drv_MemSetAccess(CUdeviceptr p, size_t n, const CUmemAccessDesc *d, size_t c)
{
    (void)p; (void)n; (void)d; (void)c;
    return CUDA_SUCCESS;
}

static CUresult drv_MemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr p)
{
    lock();
    struct region *r = reg_find((void *)p);
    if (r && base) *base = r->base;
    if (r && size) *size = r->size;
    unlock();
    return r ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

static CUresult drv_MemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s)
{
    return (CUresult)set_bytes((void *)p, n * 4, (int)v, 4, n * 4, 1, (cudaStream_t)s);
}

static char g_ctx[MAX_DEV]; /* addresses that stand for the primary contexts */
static _Thread_local CUcontext t_ctx;
static CUresult drv_CtxGetCurrent(CUcontext *c)
{
    *c = t_ctx ? t_ctx : g_touched ? (CUcontext)&g_ctx[t_dev] : NULL;
    return CUDA_SUCCESS;
}
static CUresult drv_CtxSetCurrent(CUcontext c) { t_ctx = c; return CUDA_SUCCESS; }
static CUresult drv_DeviceGet(CUdevice *d, int i) { *d = i; return CUDA_SUCCESS; }
static CUresult drv_DeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d)
{
    if (a == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) { *v = 1; return CUDA_SUCCESS; }
    return (CUresult)cudaDeviceGetAttribute(v, (enum cudaDeviceAttr)a, d);
}
static CUresult drv_DeviceGetCount(int *n) { return (CUresult)cudaGetDeviceCount(n); }
static CUresult drv_DevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active)
{
    (void)d;
    *flags = 0;
    *active = g_touched && !g_forked;
    return CUDA_SUCCESS;
}
static CUresult drv_DevicePrimaryCtxRetain(CUcontext *c, CUdevice d)
{
    *c = (CUcontext)&g_ctx[d];
    return CUDA_SUCCESS;
}
static CUresult drv_GetErrorString(CUresult e, const char **s)
{
    *s = cudaGetErrorString((cudaError_t)e);
    return CUDA_SUCCESS;
}
static CUresult drv_Init(unsigned f) { (void)f; return CUDA_SUCCESS; }
static CUresult drv_LogsRegisterCallback(void) { return CUDA_SUCCESS; } /* never called back */
static CUresult drv_LogsUnregisterCallback(void) { return CUDA_SUCCESS; }

static const struct { const char *name; void *fn; } driver[] = {
#define D(n) {"cu" #n, (void *)drv_##n}
    D(MemGetAllocationGranularity), D(MemAddressReserve), D(MemAddressFree), D(MemCreate),
    D(MemRelease), D(MemMap), D(MemUnmap), D(MemSetAccess), D(MemGetAddressRange),
    D(MemsetD32Async), D(CtxGetCurrent), D(CtxSetCurrent), D(DeviceGet), D(DeviceGetAttribute),
    D(DeviceGetCount), D(DevicePrimaryCtxGetState), D(DevicePrimaryCtxRetain), D(GetErrorString),
    D(Init), D(LogsRegisterCallback), D(LogsUnregisterCallback),
#undef D
};

API void *fakecuda_driver_symbol(const char *name)
{
    for (size_t i = 0; i < sizeof driver / sizeof *driver; i++)
        if (!strcmp(driver[i].name, name)) return driver[i].fn;
    return (void *)drv_unsupported;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **fn, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *status)
{
    (void)version; (void)flags;
    *fn = fakecuda_driver_symbol(symbol);
    fc_log(2, "driver entry point %s%s", symbol, *fn == (void *)drv_unsupported ? " (stub)" : "");
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ------------------------------------------------- for the tests: fakecuda_* calls */

/* fakecuda_set("GBPS", "2.5"): as the environment variable FAKECUDA_GBPS.  0 if done. */
API int fakecuda_set(const char *key, const char *value)
{
    int e = -1;
    lock();
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (!strcasecmp(settings[i].name, key)) e = set_one(&settings[i], value);
    if (cfg.devices > MAX_DEV) cfg.devices = MAX_DEV;
    wake_all();
    unlock();
    return e;
}

/* The value of a setting as text that fakecuda_set() takes.  0 if there is such a setting. */
API int fakecuda_get(const char *key, char *out, size_t n)
{
    int e = -1;
    lock();
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        if (strcasecmp(settings[i].name, key)) continue;
        if (settings[i].d) snprintf(out, n, "%.17g", *settings[i].d);
        else snprintf(out, n, "%lld", (long long)*settings[i].i);
        e = 0;
    }
    unlock();
    return e;
}

/* While held, no worker starts an operation. */
API void fakecuda_hold(int on)
{
    lock();
    g_hold = on;
    wake_all();
    unlock();
}

/* Read or write device memory at once, past all streams.  0 if done. */
API int fakecuda_peek(const void *dev, void *out, size_t n)
{
    struct place p;
    lock();
    int e = place(dev, n, &p);
    if (!e) memcpy(out, p.at, n);
    unlock();
    return e;
}

API int fakecuda_poke(void *dev, const void *in, size_t n)
{
    struct place p;
    lock();
    int e = place(dev, n, &p);
    if (!e) memcpy(p.at, in, n);
    unlock();
    return e;
}

/* Forget a sticky error, which a real process cannot; counters and violations to zero. */
API void fakecuda_reset(void)
{
    lock();
    g_hold = 0;
    wake_all();
    for (int d = 0; d < cfg.devices; d++) sync_device(d);
    g_sticky = cudaSuccess;
    t_last = cudaSuccess;
    g_violations = 0;
    g_nhist = 0;
    memset(&st, 0, sizeof st);
    for (int d = 0; d < MAX_DEV; d++) g_peak[d] = g_used[d];
    g_host_peak = g_host_used;
    unlock();
}

API long long fakecuda_stat(const char *name)
{
    long long pending = 0, v = -1;
    lock();
    for (struct stream *s = g_streams; s; s = s->next) pending += s->enq - s->done;
    const struct { const char *n; int64_t v; } t[] = {
        {"h2d_copies", st.copies[H2D]}, {"h2d_bytes", st.bytes[H2D]}, {"h2d_busy_ns", st.busy_ns[H2D]},
        {"d2h_copies", st.copies[D2H]}, {"d2h_bytes", st.bytes[D2H]}, {"d2h_busy_ns", st.busy_ns[D2H]},
        {"d2d_copies", st.copies[D2D]}, {"d2d_bytes", st.bytes[D2D]}, {"memsets", st.memsets},
        {"launches", st.launches}, {"emulated", st.emulated}, {"host_fns", st.host_fns},
        {"mallocs", st.mallocs}, {"frees", st.frees}, {"host_allocs", st.host_allocs},
        {"host_frees", st.host_frees}, {"registers", st.registers}, {"unregisters", st.unregisters},
        {"records", st.records}, {"waits", st.waits}, {"syncs", st.syncs}, {"queries", st.queries},
        {"device_syncs", st.device_syncs},
        {"pageable_copies", st.pageable}, {"blocking_copies", st.blocking_copies},
        {"device_used", g_used[t_dev]}, {"device_peak", g_peak[t_dev]}, {"host_used", g_host_used},
        {"host_peak", g_host_peak}, {"registered", g_registered}, {"violations", g_violations},
        {"pending", pending}, {"sticky", g_sticky}, {"kernels_known", (int64_t)g_nsym},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) if (!strcmp(t[i].n, name)) v = t[i].v;
    unlock();
    return v;
}
