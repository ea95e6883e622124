/* driver.c - a libcuda.so.1 with what PyTorch's libcaffe2_nvrtc.so links.
 *
 * PyTorch asks the driver whether a primary context exists before it looks at a host
 * pointer (is_pinned, pin_memory), so some libcuda.so.1 has to be there.  Everything goes
 * through fakecuda_driver_symbol(): implemented in runtime.c, or "not supported".
 * cuGetProcAddress and cuGetExportTable are left out on purpose: the runtime that is
 * linked into cuBLAS and the like then gives up cleanly instead of half working.
 */
typedef int (*any_fn)(void *, void *, void *, void *, void *, void *);
void *fakecuda_driver_symbol(const char *name);

/* Six register arguments are passed on as they came; none of these needs more. */
#define FORWARD(exported, name)                                                          \
    __attribute__((visibility("default"))) int exported(void *a, void *b, void *c,       \
                                                        void *d, void *e, void *f)       \
    {                                                                                    \
        return ((any_fn)fakecuda_driver_symbol(#name))(a, b, c, d, e, f);                \
    }
#define SAME(name) FORWARD(name, name)

SAME(cuInit)
SAME(cuCtxGetCurrent)
SAME(cuCtxSetCurrent)
SAME(cuDeviceGet)
SAME(cuDeviceGetCount)
SAME(cuDeviceGetAttribute)
SAME(cuDevicePrimaryCtxGetState)
SAME(cuDevicePrimaryCtxRetain)
SAME(cuGetErrorString)
SAME(cuPointerGetAttribute)
SAME(cuFuncGetAttribute)
SAME(cuFuncSetAttribute)
SAME(cuFuncSetCacheConfig)
SAME(cuLaunchCooperativeKernel)
SAME(cuLaunchKernel)
SAME(cuLinkComplete)
SAME(cuModuleGetFunction)
SAME(cuModuleLoad)
SAME(cuModuleLoadData)
SAME(cuModuleLoadDataEx)
SAME(cuModuleUnload)
SAME(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SAME(cuTensorMapEncodeTiled)
FORWARD(cuLinkAddData_v2, cuLinkAddData)
FORWARD(cuLinkCreate_v2, cuLinkCreate)
