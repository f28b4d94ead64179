// Copies of many ranges between mapped host memory and device memory in one launch. The host's part
// is in src/transfer/gather.rs.
//
// A range has the same offset in both slabs, which are aligned to 256 bytes. Its source and its
// destination are therefore aligned alike, and all but its first and last bytes are whole vectors.
// The kernel reads and writes exactly the bytes of the ranges.
//
// Loads from the host take microseconds. Each thread makes one at a time, and there are enough
// threads to keep the link busy.

#include <stdint.h>

struct Piece {
    uint64_t offset, bytes;
};

template <int PIECES> struct Pieces {
    Piece piece[PIECES];
};

// Copies one range. A column of blocks has one range, which may be empty.
__device__ __forceinline__ void gather(unsigned char *to, const unsigned char *from, const Piece piece) {
    const uint64_t end = piece.offset + piece.bytes;
    // The first and last multiple of 16 within the range. A short range may contain neither.
    const uint64_t bound = (piece.offset + 15) & ~(uint64_t)15;
    const uint64_t first = bound < end ? bound : end;
    const uint64_t last = first + (end - first) / 16 * 16;

    const uint64_t stride = (uint64_t)gridDim.x * blockDim.x * 16;
    for (uint64_t at = first + ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) * 16; at < last; at += stride)
        *(uint4 *)(to + at) = *(const uint4 *)(from + at);

    // Fewer than 16 bytes lie before the first whole vector, and fewer than 16 after the last.
    if (blockIdx.x == 0 && threadIdx.x < 16) {
        if (piece.offset + threadIdx.x < first) to[piece.offset + threadIdx.x] = from[piece.offset + threadIdx.x];
        if (last + threadIdx.x < end) to[last + threadIdx.x] = from[last + threadIdx.x];
    }
}

// There is a short and a long table, because the caller writes a whole table for each launch.
extern "C" __global__ void __launch_bounds__(256)
cgb_gather_32(unsigned char *to, const unsigned char *from, const __grid_constant__ Pieces<32> pieces) {
    gather(to, from, pieces.piece[blockIdx.y]);
}

extern "C" __global__ void __launch_bounds__(256)
cgb_gather_224(unsigned char *to, const unsigned char *from, const __grid_constant__ Pieces<224> pieces) {
    gather(to, from, pieces.piece[blockIdx.y]);
}
