// Every operator schema of the native library, in one block: the table of contents of the native code. The
// kernels register themselves where they stand, with STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU or CUDA, m).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mipnerf_fast, m) {
    // Fenceposts and rays to integrated positional encodings [B, N, 6 (max_deg - min_deg)].
    m.def(
        "frustum_ipe_forward(Tensor t_vals, Tensor origins, Tensor directions, Tensor radii, int min_deg, "
        "int max_deg, bool cylinder, bool integrated, ScalarType out_dtype) -> Tensor");
    // Gradients of t_vals, origins, directions, radii.
    m.def(
        "frustum_ipe_backward(Tensor grad_features, Tensor t_vals, Tensor origins, Tensor directions, "
        "Tensor radii, int min_deg, int max_deg, bool cylinder, bool integrated) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}
