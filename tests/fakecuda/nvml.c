/* nvml.c - a libnvidia-ml.so.1 with the seven functions that libc10_cuda.so looks up.
 *
 * Needed by expandable segments only, which ask NVML whether the device is on a fabric and
 * crash if there is no NVML.  nvmlInit and nvmlDeviceGetCount_v2, which torch/cuda/__init__.py
 * tries, are left out on purpose: it then asks the runtime how many devices there are.
 */
enum { OK = 0, NOT_SUPPORTED = 3 };
#define API __attribute__((visibility("default")))

API int nvmlInit_v2(void) { return OK; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char *id, const void **device)
{
    *device = id; /* only handed back to us */
    return OK;
}
API int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *infos)
{
    (void)device;
    (void)infos;
    *count = 0;
    return OK;
}
API int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
API int nvmlDeviceGetGpuFabricInfoV(void) { return NOT_SUPPORTED; }
API int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    *version = 13000;
    return OK;
}
