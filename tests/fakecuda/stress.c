/* stress.c - several threads, streams and events at random on the fake runtime, data checked.
 * For the sanitizers: `build.py sanitize`. */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define OK(x) do { cudaError_t e_ = (x); if (e_) { fprintf(stderr, "%s: %d\n", #x, (int)e_); abort(); } } while (0)
enum { N = 1 << 16, SLOTS = 3, ROUNDS = 150 };
static cudaStream_t shared;

static void *work(void *arg)
{
    unsigned seed = (unsigned)(size_t)arg;
    cudaStream_t up, down;
    cudaEvent_t arrived, done[SLOTS], t0;
    unsigned char *in[SLOTS], *out, *dev;
    OK(cudaStreamCreateWithFlags(&up, cudaStreamNonBlocking));
    OK(cudaStreamCreateWithFlags(&down, seed & 1 ? cudaStreamNonBlocking : 0));
    OK(cudaEventCreate(&t0));
    OK(cudaEventCreateWithFlags(&arrived, cudaEventDisableTiming));
    OK(cudaHostAlloc((void **)&out, N, 0));
    OK(cudaMalloc((void **)&dev, N * SLOTS));
    for (int i = 0; i < SLOTS; i++) {
        OK(cudaEventCreate(&done[i]));
        OK(cudaHostAlloc((void **)&in[i], N, 0));
    }
    for (int r = 0; r < ROUNDS; r++) {
        int k = r % SLOTS, v = rand_r(&seed) & 255;
        OK(cudaEventSynchronize(done[k]));
        memset(in[k], v, N);
        OK(cudaMemcpyAsync(dev + k * N, in[k], N, cudaMemcpyHostToDevice, up));
        OK(cudaEventRecord(done[k], up));
        if (r % 7 == 0) OK(cudaStreamWaitEvent(shared, done[k], 0));
        if (r % 5 == 0) {
            OK(cudaEventRecord(arrived, up));
            OK(cudaStreamWaitEvent(down, arrived, 0));
            OK(cudaMemsetAsync(dev + k * N, v + 1, N / 2, down));
            OK(cudaMemcpyAsync(out, dev + k * N, N, cudaMemcpyDeviceToHost, down));
            if (r % 2) while (cudaStreamQuery(down) == cudaErrorNotReady) {}
            else OK(cudaStreamSynchronize(down));
            if (out[0] != (unsigned char)(v + 1) || out[N - 1] != v) abort();
        }
        if (r % 50 == 49) {
            void *p;
            OK(cudaMalloc(&p, 100 << 10));
            OK(cudaMemcpy(p, in[k], N, cudaMemcpyHostToDevice));
            OK(cudaFree(p));
            OK(cudaDeviceSynchronize());
        }
    }
    OK(cudaStreamSynchronize(up));
    for (int i = 0; i < SLOTS; i++) { OK(cudaEventDestroy(done[i])); OK(cudaFreeHost(in[i])); }
    OK(cudaEventDestroy(arrived));
    OK(cudaEventDestroy(t0));
    OK(cudaStreamDestroy(up));
    OK(cudaStreamDestroy(down));
    OK(cudaFreeHost(out));
    OK(cudaFree(dev));
    return NULL;
}

int main(void)
{
    pthread_t t[4];
    OK(cudaStreamCreate(&shared));
    for (size_t i = 0; i < 4; i++) pthread_create(&t[i], NULL, work, (void *)(i + 1));
    for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
    OK(cudaDeviceSynchronize());
    puts("stress: ok");
}
