// The fused network of compute capability 9.0a; driven by tests/test_mlp_hopper.py. `what` says which
// launches. One width and one number type a program (macros MIPNERF_WIDTH, MIPNERF_TYPE).
#include "mlp/mlp_hopper_backward_kernels.cuh"
#include "mlp/mlp_hopper_kernels.cuh"
#include "mlp/mlp_hopper_wgrad_kernels.cuh"
#include "mlp_compositing.h"
#include "program.h"

using namespace mipnerf;
using namespace mipnerf::mlp_hopper;

namespace {

using T = MIPNERF_TYPE;
constexpr int kWidth = MIPNERF_WIDTH;

MlpPlan plan_of(const emulation::Program& program) {
    MlpShape shape{};
    shape.features = static_cast<int>(program.integer("features"));
    shape.width = kWidth;
    shape.depth = static_cast<int>(program.integer("depth"));
    shape.skip_layer = static_cast<int>(program.integer("skip_layer"));
    shape.view_width = static_cast<int>(program.integer("view_width"));
    shape.view_depth = static_cast<int>(program.integer("view_depth"));
    shape.has_view = shape.view_depth > 0;
    return make_mlp_plan(shape);
}

// weights and biases lie one after the other, as the gradients do.
void run_pack(const emulation::Program& program, const MlpPlan& plan) {
    MlpPackArguments pack{};
    pack.plan = plan;
    const float* parameters = program.input<float>("parameters");
    for (int l = 0; l < plan.layers; ++l) {
        pack.weights[l] = parameters + plan.layer[l].weight_offset;
        pack.biases[l] = plan.layer[l].has_ray_bias ? nullptr : parameters + plan.layer[l].bias_offset;
    }
    pack.packed = program.output<std::uint8_t>("packed");
    launch_mlp_pack<kWidth, T>(pack, nullptr);
}

// The features of MlpEncoding as frustum_ipe_math.h gives them, row after row.
void encode(const MlpForwardArguments<T>& in, T* features) {
    const int degrees = in.plan.shape.features / 6;
    for (std::int64_t sample = 0; sample < in.samples; ++sample) {
        const std::int64_t ray = sample / in.samples_per_ray;
        const float* t = in.encoding.t_vals + sample + ray;
        const RayConstants<float> constants = ray_constants(
            in.encoding.origins + 3 * ray, in.encoding.directions + 3 * ray, in.encoding.radii[ray]);
        const FrustumMoments<float> moments = in.encoding.cylinder
                                                  ? frustum_moments<FrustumShape::kCylinder>(t[0], t[1])
                                                  : frustum_moments<FrustumShape::kCone>(t[0], t[1]);
        T* row = features + sample * in.plan.shape.features;
        for (int k = 0; k < 3; ++k)
            for (int degree = 0; degree < degrees;) {
                const EncodedCoordinate<float> coordinate = encoded_coordinate(constants, moments, k);
                const float scale = std::ldexp(1.0f, in.encoding.min_deg + degree);
                SinCos<float> value[4];
                const int count = degree + 4 <= degrees ? 4 : 1;
                if (in.encoding.integrated)
                    count == 4 ? encode_degrees<true, 4>(coordinate, scale, value)
                               : encode_degrees<true, 1>(coordinate, scale, value);
                else
                    count == 4 ? encode_degrees<false, 4>(coordinate, scale, value)
                               : encode_degrees<false, 1>(coordinate, scale, value);
                for (int i = 0; i < count; ++i, ++degree) {
                    row[3 * degree + k] = from_float<T>(value[i].sin);
                    row[3 * (degrees + degree) + k] = from_float<T>(value[i].cos);
                }
            }
    }
}

void run_forward(const emulation::Program& program, const MlpPlan& plan, const void* packed) {
    MlpForwardArguments<T> forward{};
    forward.plan = plan;
    forward.samples = program.size("density", 0);
    forward.samples_per_ray = program.integer("samples_per_ray");
    forward.features = program.input<T>("x");
    if (program.has("t_vals")) {
        forward.encoding.t_vals = program.input<float>("t_vals");
        forward.encoding.origins = program.input<float>("origins");
        forward.encoding.directions = program.input<float>("directions");
        forward.encoding.radii = program.input<float>("radii");
        forward.encoding.min_deg = static_cast<int>(program.integer("min_deg"));
        forward.encoding.cylinder = program.integer("cylinder") != 0;
        forward.encoding.integrated = program.integer("integrated") != 0;
        encode(forward, program.output<T>("encoded"));
    }
    forward.ray_bias = program.input<float>("ray_bias");
    forward.packed = packed;
    forward.rgb = program.output<float>("rgb");
    forward.density = program.output<float>("density");
    forward.activations = program.output<T>("activations");
    forward.masks = program.output<std::uint32_t>("masks");
    launch_mlp_forward<kWidth, T>(forward, nullptr);
    if (program.has("pixels")) {
        forward.features = nullptr;
        forward.rgb = forward.density = nullptr;
        forward.compositing = emulation::compositing(program);
        launch_mlp_forward<kWidth, T>(forward, nullptr);
    }
}

void run_dgrad(const emulation::Program& program, const MlpPlan& plan) {
    MlpDgradArguments<T> dgrad{};
    dgrad.plan = plan;
    dgrad.samples = program.integer("samples");
    dgrad.grad_rgb = program.input<float>("grad_rgb");
    dgrad.grad_density = program.input<float>("grad_density");
    dgrad.packed = program.input<std::uint8_t>("packed");
    dgrad.masks = program.input<std::uint32_t>("masks");
    dgrad.deltas = program.output<T>("deltas");
    dgrad.grad_features = program.output<float>("grad_features");
    launch_mlp_dgrad<kWidth, T>(dgrad, nullptr);
}

void run_wgrad(const emulation::Program& program, const MlpPlan& plan) {
    MlpWgradArguments<T> wgrad{};
    wgrad.plan = plan;
    wgrad.samples = program.integer("samples");
    wgrad.samples_per_ray = program.integer("samples_per_ray");
    wgrad.activations = program.input<T>("activations");
    wgrad.deltas = program.input<T>("deltas");
    wgrad.gradients = program.output<float>("gradients");
    wgrad.ray_sums = program.output<float>("ray_sums");
    wgrad.workspace = program.output<float>("workspace");
    launch_mlp_wgrad<kWidth, T>(wgrad, nullptr);
}

// The map of packing, there and back: for every element of every pass its place, and of the place the
// element.
void run_places(const emulation::Program& program, const MlpPlan& plan) {
    const Passes passes = make_passes(plan);
    std::int32_t* found =
        program.output<std::int32_t>("found");  // how often each packed element is someone's
    const auto visit = [&](const Pass& pass) {
        for (int column = 0; column < pass.columns; ++column)
            for (int k = 0; k < pass.k(); ++k) {
                const int place = packed_place(pass, column, k);
                int column_back, k_back;
                packed_at(pass, place, column_back, k_back);
                if (column_back != column || k_back != k)
                    emulation::fail("packed_at is not packed_place's inverse");
                ++found[pass.offset + place];
            }
    };
    for (int i = 0; i < passes.forward.count; ++i) visit(passes.forward.pass[i]);
    for (int i = 0; i < passes.backward.count; ++i) visit(passes.backward.pass[i]);
}

}  // namespace

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    const MlpPlan plan = plan_of(program);
    emulation::set_multiprocessors(static_cast<int>(program.integer("multiprocessors")));
    const std::string what = program.text("what");
    if (what == "sizes") {
        const Passes passes = make_passes(plan);
        const MlpSizes sizes = sizes_with_workspace(plan, program.integer("samples"));
        std::int64_t* out = program.output<std::int64_t>("sizes");
        const std::int64_t values[] = {sizes.packed,    sizes.activations, sizes.masks,  sizes.deltas,
                                       sizes.workspace, passes.elements,   passes.biases};
        for (int i = 0; i < 7; ++i) out[i] = values[i];
    } else if (what == "places") {
        run_places(program, plan);
    } else if (what == "forward") {
        run_pack(program, plan);
        run_forward(program, plan, program.output<std::uint8_t>("packed"));
    } else if (what == "dgrad") {
        run_dgrad(program, plan);
    } else if (what == "wgrad") {
        run_wgrad(program, plan);
    } else {
        emulation::fail("nothing is called '%s'", what.c_str());
    }
}
