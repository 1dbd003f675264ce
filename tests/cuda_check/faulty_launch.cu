// Two kernels that benchmarks/cuda_check.py must turn down: it compiles them first, to know that it would
// notice.

// Four hundred values that are all needed at the end do not fit into the 32 registers that the bounds leave.
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y) {
    float value[400];
#pragma unroll
    for (int i = 0; i < 400; ++i) value[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 400; ++i)
        y[i * 1024 + threadIdx.x] = value[i] + value[399 - i] * value[(i * 7) % 400];
}

// An array read and written at places known only at run time lives in local memory.
__global__ void local_array_kernel(const float* x, float* y, const int* place, int n) {
    float value[64] = {};
    for (int i = 0; i < n; ++i) value[place[i]] += x[i * 1024 + threadIdx.x];
    for (int i = 0; i < n; ++i) y[i * 1024 + threadIdx.x] = value[place[n - i]];
}
