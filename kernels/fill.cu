// Fills device memory with a pattern of any length, at any address: see src/fill.rs for the host side.
//
// A fill repeats a period of `period` 16-byte vectors; the host writes the element out until it comes
// round to a multiple of 16 bytes, so that a thread only ever stores whole vectors that it holds in
// registers. A block covers a tile of STORES rows, each row a multiple of the period long; the vector
// that belongs in a column is therefore the same in every row, and is loaded once.

#include <stdint.h>

// Kernel parameters hold 4,096 bytes on every driver (CUDA C++ Programming Guide, "__global__ Function
// Parameters"): the pattern, two addresses' worth of numbers, and room to spare.
#define PATTERN_VECTORS 224
#define STORES 4

struct Pattern {
    uint4 vector[PATTERN_VECTORS];
};

// Fills `bytes` bytes at `dst`. The pattern begins at the first 16-byte bound at or after `dst`; the
// bytes before that bound are the end of the period.
extern "C" __global__ void __launch_bounds__(256)
cgb_fill(unsigned char *dst, uint64_t bytes, uint32_t period, const __grid_constant__ Pattern pattern) {
    __shared__ uint4 shared[PATTERN_VECTORS];
    for (uint32_t i = threadIdx.x; i < period; i += blockDim.x) shared[i] = pattern.vector[i];
    __syncthreads();

    uint64_t head = -(uint64_t)dst & 15;
    if (head > bytes) head = bytes;
    const uint64_t vectors = (bytes - head) / 16;
    uint4 *body = (uint4 *)(dst + head);

    // Rows are as long as whole periods allow in one pass of the block.
    const uint32_t row = blockDim.x / period * period;
    const uint64_t first = (uint64_t)blockIdx.x * row * STORES + threadIdx.x;
    if (threadIdx.x < row) {
        const uint4 vector = shared[threadIdx.x % period];
#pragma unroll
        for (int store = 0; store < STORES; store++) {
            const uint64_t at = first + (uint64_t)store * row;
            if (at < vectors) body[at] = vector;
        }
    }

    // Fewer than 16 bytes before the first bound, and fewer than 16 after the last.
    if (blockIdx.x == 0 && threadIdx.x < 32) {
        const unsigned char *period_bytes = (const unsigned char *)shared;
        const uint64_t length = (uint64_t)period * 16;
        const uint64_t tail = head + vectors * 16;
        if (threadIdx.x < head) dst[threadIdx.x] = period_bytes[length - (-(uint64_t)dst & 15) + threadIdx.x];
        if (tail + threadIdx.x < bytes) dst[tail + threadIdx.x] = period_bytes[(vectors * 16 + threadIdx.x) % length];
    }
}

// Repeats the first `period` units of `dst` through its first `units`, for elements too long to pass as
// a parameter.
template <typename Unit>
__device__ void repeat(Unit *dst, uint64_t units, uint64_t period) {
    const uint64_t stride = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = period + (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < units; i += stride)
        dst[i] = dst[i % period];
}

extern "C" __global__ void cgb_repeat1(uint8_t *dst, uint64_t units, uint64_t period) { repeat(dst, units, period); }
extern "C" __global__ void cgb_repeat16(uint4 *dst, uint64_t units, uint64_t period) { repeat(dst, units, period); }
