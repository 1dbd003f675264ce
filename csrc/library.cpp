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
    // out = op(a) op(b) + beta out with an epilogue (see csrc/mlp/gemm_cublaslt.cpp); vector is a bias, or
    // takes the column sums of a; mask is the ReLU's, a bit per element. False where cuBLASLt has no
    // algorithm for it: nothing is written then. CUDA alone.
    m.def(
        "gemm_cublaslt(Tensor a, Tensor b, Tensor(a!) out, bool transpose_a, bool transpose_b, float beta, "
        "int epilogue, Tensor(b!)? vector, Tensor(c!)? mask, Tensor(d!) workspace) -> bool");
    // The folded network forward on the CPU: features [S, F] to raw rgb [S, 3], raw density [S, 1], the
    // outputs of the layers with a ReLU from the one numbered first_kept on, and the matrix over the trunk:
    // the colour branch's layer, into which the bottleneck is folded where there are viewdirs_enc [B, V],
    // above density's row. Parameters are weight and bias of every layer as the paper has them.
    m.def(
        "mlp_tiles_forward(Tensor features, Tensor? viewdirs_enc, Tensor[] parameters, int depth, "
        "int skip_layer, int first_kept) -> Tensor[]");
    // From the gradient of that matrix [C + 1, K], of its outputs' sums over all samples [C + 1] and over
    // every ray's [B, C] those of weight and bias of density, the bottleneck and the layer above it, and of
    // viewdirs_enc (empty unless asked for).
    m.def(
        "mlp_unfold(Tensor grad_top, Tensor sums, Tensor of_ray_biases, Tensor viewdirs_enc, "
        "Tensor view_weight, Tensor bottleneck_weight, Tensor bottleneck_bias, bool to_viewdirs) -> "
        "Tensor[]");
    // One layer's way down on the CPU. With delta [S, N] the gradient of its outputs, x [S, K] the outputs of
    // the layer below behind their ReLU, and beside [S, F] what else it reads: grad_weight [N, K + F] and
    // grad_bias [N] (+)= delta^T [x, beside] and the sums of delta; below [S, K] = delta weight where x > 0;
    // ray_sums [B, C] the sums of the first C columns of delta over each ray's samples.
    m.def(
        "mlp_layer_backward(Tensor delta, Tensor x, Tensor? beside, Tensor weight, Tensor(a!)? below, "
        "Tensor(b!) grad_weight, Tensor(c!) grad_bias, Tensor(d!)? ray_sums, bool add) -> ()");
    // ---- the fused network: csrc/mlp. Its sizes are numbers: width, depth, skip_layer of the trunk,
    // view_width and view_depth of the view branch (0 without). Parameters of the folded network, each weight
    // and bias at a multiple of 4, to the kernels' order.
    m.def(
        "mlp_pack(Tensor parameters, int features, int width, int depth, int skip_layer, int view_width, "
        "int view_depth, ScalarType dtype) -> Tensor");
    // Features [S, F] to raw rgb [S, 3], raw density [S], and with training what mlp_backward needs again:
    // activations and masks, in bytes. ray_bias [rays, view_width] is the view branch's first bias.
    m.def(
        "mlp_forward(Tensor features, Tensor? ray_bias, Tensor packed, int samples_per_ray, int width, int "
        "depth, "
        "int skip_layer, int view_width, int view_depth, bool training) -> (Tensor, Tensor, Tensor, Tensor)");
    // frustum_ipe and the network in one kernel, for inference.
    m.def(
        "mlp_encoded_forward(Tensor t_vals, Tensor origins, Tensor directions, Tensor radii, Tensor? "
        "ray_bias, "
        "Tensor packed, int min_deg, int max_deg, bool cylinder, bool integrated, int width, int depth, "
        "int skip_layer, int view_width, int view_depth, ScalarType dtype) -> (Tensor, Tensor)");
    // The same and composite_forward: rgb [B, 3], distance [B], acc [B], weights [B, N].
    m.def(
        "mlp_composited_forward(Tensor t_vals, Tensor origins, Tensor directions, Tensor radii, Tensor? "
        "ray_bias, "
        "Tensor packed, int min_deg, int max_deg, bool cylinder, bool integrated, int width, int depth, "
        "int skip_layer, int view_width, int view_depth, ScalarType dtype, bool white_background, "
        "int density_activation, float density_bias, int rgb_activation, float rgb_padding) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    // Gradients of the parameters of mlp_pack (in place of the bias of view 0: the sum of ray_sums), of
    // ray_bias, and of the features (float32; no rows unless to_features). Without deterministic the sums'
    // order differs from run to run.
    m.def(
        "mlp_backward(Tensor? grad_rgb, Tensor? grad_density, Tensor features, Tensor packed, Tensor "
        "activations, "
        "Tensor masks, int samples_per_ray, int width, int depth, int skip_layer, int view_width, int "
        "view_depth, "
        "bool deterministic, bool to_features) -> (Tensor, Tensor, Tensor)");
    // Random 32-bit words [R, columns] of the rows' numbers, by Philox 4x32-10; step is one number on their
    // device.
    m.def("counter_words(int seed, Tensor step, int stream, Tensor rows, int columns) -> Tensor");
    // Pixels of a step drawn by those words, with replacement, of all images or of one: origins, directions,
    // viewdirs [B, 3], radii, near, far, lossmult [B, 1], target colours [B, 3]. common_size is the number of
    // pixels of each image, or 0 where they differ.
    m.def(
        "ray_batch(Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w, Tensor focals, "
        "Tensor nears, Tensor fars, Tensor lossmults, int seed, Tensor step, int count, bool single_image, "
        "int common_size, bool white_background) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    // ---- the fast model
    // Pixels of a step drawn by counter-based random numbers: origins, directions [B, 3], radii, near, far,
    // phase [B, 1], background and target colours [B, 3]. Of the images in `order`, sorted by scale, group g
    // (ending at group_ends[g]) is drawn with the probability that group_shares[g] (ascending, the last 1)
    // adds.
    m.def(
        "draw_rays(Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w, Tensor focals, "
        "Tensor nears, Tensor fars, Tensor order, Tensor group_ends, Tensor group_shares, int seed, int "
        "step, "
        "int count, bool random_background, float background) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    // Gaussians [S, 3], [S] in the unit box to features [S, L F]; attenuation, here and below, is 0 for none,
    // 1 for gaussian, 2 for erf.
    m.def(
        "hash_encode_forward(Tensor points, Tensor scales, Tensor tables, int[] resolutions, int table_size, "
        "int attenuation, float cutoff) -> Tensor");
    // Gradients of points, scales, tables. On CUDA, without deterministic the order of the tables' sums
    // differs from run to run.
    m.def(
        "hash_encode_backward(Tensor grad_features, Tensor points, Tensor scales, Tensor tables, "
        "int[] resolutions, int table_size, int attenuation, float cutoff, bool deterministic) "
        "-> (Tensor, Tensor, Tensor)");
    // Rays to packed samples: ray_starts [B + 1], rays [S], t0, t1 [S], means [S, 3], scales [S].
    m.def(
        "march(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, Tensor phase, "
        "Tensor masks, int occupancy_resolution, float box_half, float step_scale, float min_step, "
        "float max_step) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    // Encoded samples [S, E] and the harmonics [B, 16] of their rays to rgb [S, 3], density [S]. tf32, here
    // and below: products with operands rounded to TF32, of CUDA devices from compute capability 8.0 on.
    m.def(
        "tiny_mlp_forward(Tensor features, Tensor harmonics, Tensor rays, Tensor density_in, "
        "Tensor density_out, Tensor colour_in, Tensor? colour_hidden, Tensor colour_out, bool tf32) "
        "-> (Tensor, Tensor)");
    // Gradients of features, harmonics (without rows unless wanted), density_in, density_out, colour_in,
    // colour_hidden (without rows unless given), colour_out.
    m.def(
        "tiny_mlp_backward(Tensor grad_rgb, Tensor grad_density, Tensor features, Tensor harmonics, "
        "Tensor rays, Tensor density_in, Tensor density_out, Tensor colour_in, Tensor? colour_hidden, "
        "Tensor colour_out, bool tf32, bool wants_features, bool wants_harmonics) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    // Packed samples to rgb [B, 3], distance [B], acc [B], weights [S].
    m.def(
        "packed_composite_forward(Tensor rgb, Tensor density, Tensor lengths, Tensor middles, Tensor "
        "ray_starts, "
        "Tensor background, Tensor near) -> (Tensor, Tensor, Tensor, Tensor)");
    // Gradients of rgb, density, lengths, background.
    m.def(
        "packed_composite_backward(Tensor grad_rgb, Tensor grad_distance, Tensor grad_acc, Tensor "
        "grad_weights, "
        "Tensor rgb, Tensor density, Tensor lengths, Tensor middles, Tensor ray_starts, Tensor background, "
        "Tensor near) -> (Tensor, Tensor, Tensor, Tensor)");
    // Everything from marching to gradients, fused: mean loss, mean squared error, samples, samples that
    // counted, finite (float64 [5]). Gradients are added to grad_*, unless one is not finite. On CUDA the
    // order of the tables' sums differs from run to run, unless table_sums is given: int64 [entries, F], zero
    // before and after, to sum in fixed point. The CPU takes none.
    m.def(
        "fast_train_step(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, Tensor? "
        "phase, "
        "Tensor background, Tensor target, float loss_beta, Tensor tables, Tensor density_in, "
        "Tensor density_out, Tensor colour_in, Tensor? colour_hidden, Tensor colour_out, Tensor masks, "
        "int[] resolutions, int table_size, int attenuation, float cutoff, bool scale_input, float "
        "scale_low, "
        "float scale_high, int occupancy_resolution, float box_half, float step_scale, float min_step, "
        "float max_step, bool tf32, "
        "Tensor(a!) grad_tables, Tensor(b!) grad_density_in, Tensor(c!) grad_density_out, "
        "Tensor(d!) grad_colour_in, Tensor(e!)? grad_colour_hidden, Tensor(f!) grad_colour_out, "
        "Tensor(g!)? table_sums) -> Tensor");
    // fast_train_step, and sparse_adam of the tables with the gradients it found, which are never whole.
    m.def(
        "fast_train_update(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, Tensor? "
        "phase, "
        "Tensor background, Tensor target, float loss_beta, Tensor(a!) tables, Tensor density_in, "
        "Tensor density_out, Tensor colour_in, Tensor? colour_hidden, Tensor colour_out, Tensor masks, "
        "int[] resolutions, int table_size, int attenuation, float cutoff, bool scale_input, float "
        "scale_low, "
        "float scale_high, int occupancy_resolution, float box_half, float step_scale, float min_step, "
        "float max_step, bool tf32, "
        "Tensor(b!) grad_density_in, Tensor(c!) grad_density_out, Tensor(d!) grad_colour_in, "
        "Tensor(e!)? grad_colour_hidden, Tensor(f!) grad_colour_out, Tensor(g!) moment1, Tensor(h!) moment2, "
        "float learning_rate, float beta1, float beta2, float eps, int step) -> Tensor");
    // Rays to rgb [B, 3], distance [B], acc [B].
    m.def(
        "fast_render(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, Tensor? "
        "phase, "
        "Tensor background, Tensor tables, Tensor density_in, "
        "Tensor density_out, Tensor colour_in, Tensor? colour_hidden, Tensor colour_out, Tensor masks, "
        "int[] resolutions, int table_size, int attenuation, float cutoff, bool scale_input, float "
        "scale_low, "
        "float scale_high, int occupancy_resolution, float box_half, float step_scale, float min_step, "
        "float max_step, bool tf32) -> (Tensor, Tensor, Tensor)");
    // Raises the densities of drawn cells, decays those visited, and makes the masks anew; returns float64
    // [2]: share of cells occupied, threshold used.
    m.def(
        "occupancy_update(Tensor(a!) densities, float cell_scale, int seed, int step, int stride, float "
        "decay, "
        "float max_threshold, Tensor tables, Tensor density_in, "
        "Tensor density_out, Tensor colour_in, Tensor? colour_hidden, Tensor colour_out, Tensor(b!) masks, "
        "int[] resolutions, int table_size, int attenuation, float cutoff, bool scale_input, float "
        "scale_low, "
        "float scale_high, int occupancy_resolution, float box_half, float step_scale, float min_step, "
        "float max_step, bool tf32) -> Tensor");
    // The masks of a grid of densities: cells above the smaller of max_threshold and the grid's mean.
    m.def("occupancy_masks(Tensor densities, float max_threshold, Tensor(a!) masks) -> Tensor");
    // Adam in place, where the gradient is not zero; the gradient is zeroed.
    m.def(
        "sparse_adam(Tensor(a!) values, Tensor(b!) gradient, Tensor(c!) moment1, Tensor(d!) moment2, "
        "float learning_rate, float beta1, float beta2, float eps, int step) -> ()");
    // ---- the fast model's training step on CUDA, to be captured in a graph: what changes from step to step
    // lies on the device. draw_rays, of which active_rays [1] are drawn by the number in step [1].
    m.def(
        "draw_rays_captured(Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w, Tensor "
        "focals, Tensor nears, Tensor fars, Tensor order, Tensor group_ends, Tensor group_shares, int seed, "
        "Tensor step, Tensor active_rays, int count, bool random_background, float background) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    // fast_train_step of the first active_rays [1] rays, as far as there is room for their samples; the
    // statistics have a sixth number, the rays that took part.
    m.def(
        "fast_train_step_captured(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, "
        "Tensor? phase, Tensor background, Tensor target, Tensor active_rays, int capacity, float loss_beta, "
        "Tensor tables, Tensor density_in, Tensor density_out, Tensor colour_in, Tensor? colour_hidden, "
        "Tensor colour_out, Tensor masks, int[] resolutions, int table_size, int attenuation, float cutoff, "
        "bool scale_input, float scale_low, float scale_high, int occupancy_resolution, float box_half, "
        "float step_scale, float min_step, float max_step, bool tf32, "
        "Tensor(a!) grad_tables, Tensor(b!) grad_density_in, Tensor(c!) grad_density_out, "
        "Tensor(d!) grad_colour_in, Tensor(e!)? grad_colour_hidden, Tensor(f!) grad_colour_out, "
        "Tensor(g!)? table_sums) -> Tensor");
    // sparse_adam at learning_rate [1] times rate_ratio, after step [1] steps; also writes a float16 copy.
    m.def(
        "sparse_adam_captured(Tensor(a!) values, Tensor(b!) gradient, Tensor(c!) moment1, Tensor(d!) "
        "moment2, "
        "Tensor(e!)? copy, Tensor learning_rate, float rate_ratio, float beta1, float beta2, float eps, "
        "Tensor step) -> ()");
    // From a step's statistics to the next one's number of rays and number.
    m.def(
        "fast_pace_captured(Tensor statistics, Tensor(a!) samples_per_ray, Tensor(b!) active_rays, "
        "Tensor(c!) step, float batch, int least, int most) -> ()");
}
