// Fills of device memory with a pattern of any length, at any address. The host's part is in
// src/transfer/fill.rs.
//
// A fill repeats a period of `period` vectors of 16 bytes. The host repeats the element until its
// length is a multiple of 16 bytes. Each thread therefore stores whole vectors from its registers.
//
// A block covers STORES rows. A row has one vector for each thread. The host makes a row a multiple
// of the period, so that every row has the same vector in a column. A row is also a multiple of 128
// bytes if possible, because memory is written in lines of 128 bytes.
//
// The stores are streaming stores, which are up to 15 % faster on an H100. Filled memory is seldom
// read before it leaves the cache.

#include <stdint.h>

// Stores of each thread. With one store, periods up to 5 vectors are 1 % faster at 64 MB. Longer ones
// take twice the time, because the threads of a warp read their vectors one after the other. More
// than two stores gain nothing (H100).
#define STORES 2

template <int VECTORS> struct Pattern {
    uint4 vector[VECTORS];
};

// Fills `bytes` bytes at `dst`. The pattern begins at the first multiple of 16 at or after `dst`.
// The bytes before it are the end of the period.
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

    // Fewer than 16 bytes lie before the first whole vector, and fewer than 16 after the last.
    if (blockIdx.x == 0 && threadIdx.x < 16) {
        const unsigned char *period_bytes = (const unsigned char *)pattern.vector;
        const uint64_t length = (uint64_t)period * 16;
        const uint64_t tail = head + vectors * 16;
        if (threadIdx.x < head) dst[threadIdx.x] = period_bytes[length - before + threadIdx.x];
        if (tail + threadIdx.x < bytes) dst[tail + threadIdx.x] = period_bytes[(vectors * 16 + threadIdx.x) % length];
    }
}

// For short periods. A launch with a short parameter costs the caller less.
extern "C" __global__ void __launch_bounds__(1024)
cgb_fill_short(unsigned char *dst, uint64_t bytes, uint32_t period, const __grid_constant__ Pattern<16> pattern) {
    fill(dst, bytes, period, pattern);
}

// For longer periods. Parameters may have 4,096 bytes on every driver (CUDA C++ Programming Guide,
// "__global__ Function Parameters"). The pattern and the numbers need less. Threads that read
// different parameters are served one after the other, so a block reads each vector once.
extern "C" __global__ void __launch_bounds__(1024)
cgb_fill_long(unsigned char *dst, uint64_t bytes, uint32_t period, const __grid_constant__ Pattern<224> pattern) {
    __shared__ Pattern<224> shared;
    for (uint32_t i = threadIdx.x; i < period; i += blockDim.x) shared.vector[i] = pattern.vector[i];
    __syncthreads();
    fill(dst, bytes, period, shared);
}

// Repeats a period of `period` bytes through `bytes` bytes at `dst`, for elements that are too long
// for a parameter. The period is a whole number of units. It begins at the first multiple of a
// unit at or after `dst`. The period and the bytes before it have been written.
//
// A thread holds one unit of the period. The first `blocks` blocks store the second period, the
// next `blocks` blocks the third, and so on. After the last block, the first blocks take the next turn.
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

    // Fewer bytes than a unit follow the last whole unit.
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
