/* Shared by runtime.c and kernels.c. */
#ifndef FAKECUDA_INTERNAL_H
#define FAKECUDA_INTERNAL_H
#include <stdbool.h>
#include <stddef.h>

enum dir { H2D, D2H, D2D, H2H };

typedef void (*fc_kernel_fn)(void *arg);

/* What a launch amounts to: run(arg) on the stream's thread; arg is freed after. */
struct fc_kernel_plan {
    fc_kernel_fn run;
    void *arg;
    struct { const void *p; size_t n; bool write; } range[8];
    int nranges;
};

/* Fill *plan and return true if the kernel of that mangled name is one we can reproduce. */
bool fc_plan_kernel(const char *name, void **args, struct fc_kernel_plan *plan);
/* Host address of device memory; NULL if [ptr, ptr+n) is none. */
char *fc_device_bytes(const void *ptr, size_t n);
void fc_log(int level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#endif
