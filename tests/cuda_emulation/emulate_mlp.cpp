// The fused network with mma.sync products: packing, forward, dgrad and wgrad in one run; driven by
// tests/test_mlp_kernels.py. One width and one number type a program (macros MIPNERF_WIDTH, MIPNERF_TYPE).
#include "mlp/mlp_backward_kernels.cuh"
#include "mlp/mlp_kernels.cuh"
#include "mlp_compositing.h"
#include "program.h"

using namespace mipnerf;
using namespace mipnerf::mlp_mma;

using T = MIPNERF_TYPE;
constexpr int kWidth = MIPNERF_WIDTH;

static MlpPlan plan_of(const emulation::Program& program) {
    const auto number = [&program](const char* name) { return static_cast<int>(program.integer(name)); };
    return make_mlp_plan({number("features"), kWidth, number("depth"), number("skip_layer"),
                          number("view_depth") > 0, number("view_width"), number("view_depth")});
}

// What the forward may compute inside, computed outside: the features of every sample.
static void encode(const MlpEncoding& encoding, std::int64_t samples, int samples_per_ray, int degrees,
                   T* features) {
    for (std::int64_t sample = 0; sample < samples; ++sample) {
        const std::int64_t ray = sample / samples_per_ray;
        const float* t = encoding.t_vals + sample + ray;
        const RayConstants<float> constants =
            ray_constants(encoding.origins + 3 * ray, encoding.directions + 3 * ray, encoding.radii[ray]);
        const FrustumMoments<float> moments = encoding.cylinder
                                                  ? frustum_moments<FrustumShape::kCylinder>(t[0], t[1])
                                                  : frustum_moments<FrustumShape::kCone>(t[0], t[1]);
        T* row = features + 6 * degrees * sample;
        for (int k = 0; k < 3; ++k) {
            const EncodedCoordinate<float> coordinate = encoded_coordinate(constants, moments, k);
            for (int half = 0; half < 2; ++half) {
                int degree = half * (degrees / 2);
                const int end = half == 0 ? degrees / 2 : degrees;
                while (degree < end) {
                    const int count = degree + 4 <= end ? 4 : 1;
                    const float scale = std::ldexp(1.0f, encoding.min_deg + degree);
                    SinCos<float> value[4];
                    if (count == 4 && encoding.integrated)
                        encode_degrees<true, 4>(coordinate, scale, value);
                    else if (count == 4)
                        encode_degrees<false, 4>(coordinate, scale, value);
                    else if (encoding.integrated)
                        encode_degrees<true, 1>(coordinate, scale, value);
                    else
                        encode_degrees<false, 1>(coordinate, scale, value);
                    for (int i = 0; i < count; ++i, ++degree) {
                        row[3 * degree + k] = from_float<T>(value[i].sin);
                        row[3 * (degrees + degree) + k] = from_float<T>(value[i].cos);
                    }
                }
            }
        }
    }
}

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    const MlpPlan plan = plan_of(program);
    const std::int64_t samples = program.integer("samples"),
                       samples_per_ray = program.integer("samples_per_ray");
    MlpPackArguments pack{plan, {}, {}, program.output<std::uint8_t>("packed")};
    for (int l = 0; l < plan.layers; ++l) {
        pack.weights[l] = program.input<float>("weight" + std::to_string(l));
        pack.biases[l] = program.input<float>("bias" + std::to_string(l));
    }
    launch_mlp_pack<kWidth, T>(pack, nullptr);

    MlpForwardArguments<T> forward{};
    forward.plan = plan;
    forward.samples = samples;
    forward.samples_per_ray = samples_per_ray;
    forward.features = program.input<T>("features");
    forward.ray_bias = program.input<float>("ray_bias");
    forward.packed = pack.packed;
    forward.rgb = program.output<float>("rgb");
    forward.density = program.output<float>("density");
    const bool encodes = program.has("t_vals");
    MlpEncoding encoding{};
    if (encodes) {
        encoding = {program.input<float>("t_vals"),
                    program.input<float>("origins"),
                    program.input<float>("directions"),
                    program.input<float>("radii"),
                    static_cast<int>(program.integer("min_deg")),
                    program.integer("cylinder") != 0,
                    program.integer("integrated") != 0};
        encode(encoding, samples, static_cast<int>(samples_per_ray), plan.shape.features / 6,
               program.output<T>("encoded"));
        forward.features = program.output<T>("encoded");
    }
    forward.activations = program.output<T>("activations");
    forward.masks = program.output<unsigned>("masks");
    launch_mlp_forward<kWidth, T>(forward, nullptr);

    if (program.has("inference_rgb")) {
        MlpForwardArguments<T> inference = forward;
        inference.rgb = program.output<float>("inference_rgb");
        inference.density = program.output<float>("inference_density");
        inference.activations = nullptr;
        inference.masks = nullptr;
        if (encodes) {
            inference.features = nullptr;
            inference.encoding = encoding;
        }
        launch_mlp_forward<kWidth, T>(inference, nullptr);
        if (program.has("pixels")) {
            inference.rgb = inference.density = nullptr;
            inference.compositing = emulation::compositing(program);
            launch_mlp_forward<kWidth, T>(inference, nullptr);
        }
    }
    if (!program.has("deltas")) return 0;

    const MlpDgradArguments<T> dgrad{
        plan,        samples,       program.input<float>("grad_rgb"), program.input<float>("grad_density"),
        pack.packed, forward.masks, program.output<T>("deltas"),      program.output<float>("grad_features")};
    launch_mlp_dgrad<kWidth, T>(dgrad, nullptr);

    MlpWgradArguments<T> wgrad{plan,
                               samples,
                               samples_per_ray,
                               forward.features,
                               forward.activations,
                               dgrad.deltas,
                               program.output<float>("gradients"),
                               program.output<float>("ray_sums"),
                               program.output<float>("workspace")};
    // 0: as many as the extension takes.
    if (const int splits = static_cast<int>(program.integer("splits")))
        launch_mlp_wgrad_split<kWidth, T>(wgrad, splits, nullptr);
    else
        launch_mlp_wgrad<kWidth, T>(wgrad, nullptr);
}
