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
    // Colours, densities and fenceposts to rgb [B, 3], distance [B], acc [B], weights [B, N].
    // density_activation is 0 for none, 1 for softplus, 2 for relu; rgb_activation 0 for none, 1 for sigmoid.
    // (Numbers, because torch's stable interface never frees the copy it makes of a string argument: 96 bytes
    // a call.)
    m.def(
        "composite_forward(Tensor rgb, Tensor density, Tensor t_vals, Tensor directions, bool "
        "white_background, "
        "int density_activation, float density_bias, int rgb_activation, float rgb_padding) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    // Gradients of rgb, density, t_vals, directions; the last two without rows unless geometry is true.
    m.def(
        "composite_backward(Tensor? grad_rgb, Tensor? grad_distance, Tensor? grad_acc, Tensor? grad_weights, "
        "Tensor rgb, Tensor density, Tensor t_vals, Tensor directions, bool white_background, "
        "int density_activation, float density_bias, int rgb_activation, float rgb_padding, bool geometry) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    // composite_forward and resample in one launch; its gradient is composite_backward.
    m.def(
        "composite_resample_forward(Tensor rgb, Tensor density, Tensor t_vals, Tensor directions, "
        "bool white_background, int density_activation, float density_bias, int rgb_activation, "
        "float rgb_padding, int num_samples, Tensor? u, float padding) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    // Fenceposts and weights to new fenceposts [B, num_samples + 1].
    m.def("resample(Tensor t_vals, Tensor weights, int num_samples, Tensor? u, float padding) -> Tensor");
}
