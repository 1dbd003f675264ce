// The launch of counter_words, free of torch: the extension and `make cuda-check` compile the same.
#include "counter_words_kernels.cuh"
