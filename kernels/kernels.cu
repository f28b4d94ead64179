// All kernels, as one image.
#include "fill.cu"
#include "gather.cu"
