// Fills device memory with a pattern of any length, at any address: see src/transfer/fill.rs for the host side.
//
// A fill repeats a period of `period` 16-byte vectors; the host writes the element out until it comes
// round to a multiple of 16 bytes, so that a thread only ever stores whole vectors that it holds in
// registers. A block covers STORES rows, a row being one vector of each of its threads. The host makes the
// block a multiple of the period long, so that the vector that belongs in a column is the same in every row
// of every block; and a multiple of 128 bytes, where it can, since memory is written in lines of 128.
//
// The stores are streaming ones: what is filled is seldom read before it has left the cache, and on an H100
// they are up to 15 % faster.

#include <stdint.h>

// One store to a thread is the fastest for periods up to 5 vectors, by 1 % at 64 MB, and half as fast for longer ones,
// whose vectors the threads of a warp read one after the other; more than two gain nothing for any (H100).
#define STORES 2

template <int VECTORS> struct Pattern {
    uint4 vector[VECTORS];
};

// Fills `bytes` bytes at `dst`. The pattern begins at the first 16-byte bound at or after `dst`; the
// bytes before that bound are the end of the period.
template <int VECTORS>
__device__ __forceinline__ void
fill(unsigned char *dst, uint64_t bytes, uint32_t period, const Pattern<VECTORS> &pattern) {
    const uint64_t before = -(uint64_t)dst & 15;
    const uint64_t head = before < bytes ? before : bytes;
    const uint64_t vectors = (bytes - head) / 16;
    uint4 *body = (uint4 *)(dst + head);

    const uint64_t first = (uint64_t)blockIdx.x * blockDim.x * STORES + threadIdx.x;
    const uint4 vector = pattern.vector[threadIdx.x % period];
#pragma unroll
    for (int store = 0; store < STORES; store++) {
        const uint64_t at = first + (uint64_t)store * blockDim.x;
        if (at < vectors) __stcs(body + at, vector);
    }

    // Fewer than 16 bytes before the first bound, and fewer than 16 after the last.
    if (blockIdx.x == 0 && threadIdx.x < 16) {
        const unsigned char *period_bytes = (const unsigned char *)pattern.vector;
        const uint64_t length = (uint64_t)period * 16;
        const uint64_t tail = head + vectors * 16;
        if (threadIdx.x < head) dst[threadIdx.x] = period_bytes[length - before + threadIdx.x];
        if (tail + threadIdx.x < bytes) dst[tail + threadIdx.x] = period_bytes[(vectors * 16 + threadIdx.x) % length];
    }
}

// For short periods: the less a launch has to carry, the less it costs the caller.
extern "C" __global__ void __launch_bounds__(1024)
cgb_fill_short(unsigned char *dst, uint64_t bytes, uint32_t period, const __grid_constant__ Pattern<16> pattern) {
    fill(dst, bytes, period, pattern);
}

// For longer ones. Kernel parameters hold 4,096 bytes on every driver (CUDA C++ Programming Guide,
// "__global__ Function Parameters"): the pattern, two addresses' worth of numbers, and room to spare. Threads
// that read different parameters are served one after the other, so each is read once to a block.
extern "C" __global__ void __launch_bounds__(1024)
cgb_fill_long(unsigned char *dst, uint64_t bytes, uint32_t period, const __grid_constant__ Pattern<224> pattern) {
    __shared__ Pattern<224> shared;
    for (uint32_t i = threadIdx.x; i < period; i += blockDim.x) shared.vector[i] = pattern.vector[i];
    __syncthreads();
    fill(dst, bytes, period, shared);
}

// Repeats a period of `period` bytes, a whole number of units, through `bytes` bytes at `dst`, for elements too
// long to pass as a parameter. The period begins at the first bound of a unit at or after `dst`; it is there, and
// so is what lies before it.
//
// A thread holds a unit of the period. So many `blocks` make up a period; the next as many store into the period
// after that, and so on, until the grid ends and the first take the next turn.
template <typename Unit>
__device__ __forceinline__ void repeat(unsigned char *dst, uint64_t bytes, uint64_t period, uint32_t blocks) {
    const uint64_t head = -(uint64_t)dst & (sizeof(Unit) - 1);
    const uint64_t units = (bytes - head) / sizeof(Unit), length = period / sizeof(Unit);
    Unit *body = (Unit *)(dst + head);

    const uint64_t column = (uint64_t)(blockIdx.x % blocks) * blockDim.x + threadIdx.x;
    if (column < length) {
        const Unit unit = body[column];
        for (uint64_t at = column + (1 + blockIdx.x / blocks) * length; at < units; at += gridDim.x / blocks * length)
            __stcs(body + at, unit);
    }

    // Fewer bytes than a unit has after the last bound.
    const uint64_t tail = head + units * sizeof(Unit) + threadIdx.x;
    if (blockIdx.x == 0 && tail < bytes) dst[tail] = dst[head + (tail - head) % period];
}

extern "C" __global__ void __launch_bounds__(1024)
cgb_repeat1(unsigned char *dst, uint64_t bytes, uint64_t period, uint32_t blocks) {
    repeat<uint8_t>(dst, bytes, period, blocks);
}

extern "C" __global__ void __launch_bounds__(1024)
cgb_repeat16(unsigned char *dst, uint64_t bytes, uint64_t period, uint32_t blocks) {
    repeat<uint4>(dst, bytes, period, blocks);
}
