// The kernels of the fast model's small operators; driven by tests/test_fast_kernels.py.
#include <vector>

#include "draw_rays/draw_rays_kernels.cuh"
#include "march/march_kernels.cuh"
#include "packed_composite/packed_composite_kernels.cuh"
#include "program.h"
#include "sparse_adam/sparse_adam_kernels.cuh"
#include "tiny_mlp/tiny_mlp_kernels.cuh"

using namespace mipnerf;

template <typename T>
static T* scratch(const char* name, std::int64_t count) {
    return static_cast<T*>(
        emulation::allocate(name, static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(T), 0));
}
static float number(const emulation::Program& program, const char* name) {
    return static_cast<float>(program.number(name));
}

static void march(const emulation::Program& program) {
    const std::int64_t rays = program.size("origins", 0);
    MarchArguments in{};
    in.rays = rays;
    in.active_rays = program.input<std::int32_t>("active_rays");
    in.options = {number(program, "box_half"), number(program, "step_scale"), number(program, "min_step"),
                  number(program, "max_step"), static_cast<std::int32_t>(program.integer("resolution"))};
    in.layout = occupancy_layout(in.options.resolution);
    in.masks = program.input<std::uint32_t>("masks");
    in.origins = program.input<float>("origins");
    in.directions = program.input<float>("directions");
    in.radii = program.input<float>("radii");
    in.near = program.input<float>("near");
    in.far = program.input<float>("far");
    in.phase = program.input<float>("phase");
    auto* counts = scratch<std::int32_t>("counts", rays);
    auto* totals = scratch<std::int32_t>("totals", ray_blocks(rays));
    launch_march_count(in, counts, totals, nullptr);
    const RayTotals limit{program.integer("capacity"), program.output<std::int32_t>("fit_rays"),
                          program.output<std::int32_t>("fit_samples")};
    launch_ray_starts(rays, in.active_rays, counts, totals, program.output<std::int64_t>("starts"), limit,
                      nullptr);
    launch_march_write(
        in, program.output<std::int64_t>("starts"),
        {program.output<std::int64_t>("rays"), program.output<float>("t0"), program.output<float>("t1"),
         program.output<float>("means"), program.output<float>("scales")},
        nullptr);
}

static void packed_composite(const emulation::Program& program) {
    const PackedCompositeArguments in{program.size("near", 0),
                                      program.size("density", 0),
                                      program.input<float>("rgb"),
                                      program.input<float>("density"),
                                      program.input<float>("lengths"),
                                      program.input<float>("middles"),
                                      program.input<std::int64_t>("ray_starts"),
                                      program.input<float>("background"),
                                      program.input<float>("near")};
    launch_packed_composite_forward(in,
                                    {program.output<float>("out_rgb"), program.output<float>("out_distance"),
                                     program.output<float>("out_acc"), program.output<float>("out_weights")},
                                    nullptr);
    launch_packed_composite_backward(
        in,
        {program.input<float>("cot_rgb"), program.input<float>("cot_distance"),
         program.input<float>("cot_acc"), program.input<float>("cot_weights"),
         program.output<float>("grad_rgb"), program.output<float>("grad_density"),
         program.output<float>("grad_lengths"), program.output<float>("grad_background")},
        nullptr);
}

static void sparse_adam(const emulation::Program& program) {
    const double rate = program.number("rate"), beta1 = program.number("beta1"),
                 beta2 = program.number("beta2"), eps = program.number("eps");
    SparseAdamArguments in{};
    in.count = program.size("values", 0);
    in.values = program.output<float>("values");
    in.gradient = program.output<float>("gradient");
    in.moment1 = program.output<float>("moment1");
    in.moment2 = program.output<float>("moment2");
    in.copy = program.output<Half>("copy");
    in.options = adam_options(rate, beta1, beta2, eps, program.number("step"));
    if (program.has("step_on_device"))
        in.clock = {program.input<float>("rate_on_device"), program.input<std::int64_t>("step_on_device"),
                    number(program, "rate_ratio"), adam_decays(beta1, beta2)};
    launch_sparse_adam(in, nullptr);
}

static void draw_rays(const emulation::Program& program) {
    DrawRaysArguments in{};
    in.count = program.size("origins", 0);
    in.active_rays = program.input<std::int32_t>("active_rays");
    in.seed = static_cast<std::uint64_t>(program.integer("seed"));
    in.step = static_cast<std::uint64_t>(program.integer("step"));
    in.step_on_device = program.input<std::int64_t>("step_on_device");
    in.random_background = program.integer("random_background") != 0;
    in.background = number(program, "background_value");
    in.channels = static_cast<int>(program.size("pixels", 1));
    in.groups = static_cast<int>(program.size("group_ends", 0));
    in.pixels = program.input<std::uint8_t>("pixels");
    in.offsets = program.input<std::int64_t>("offsets");
    in.heights = program.input<std::int64_t>("heights");
    in.widths = program.input<std::int64_t>("widths");
    in.c2w = program.input<float>("c2w");
    in.focals = program.input<float>("focals");
    in.nears = program.input<float>("nears");
    in.fars = program.input<float>("fars");
    in.order = program.input<std::int64_t>("order");
    in.group_ends = program.input<std::int64_t>("group_ends");
    in.group_shares = program.input<float>("group_shares");
    launch_draw_rays(in,
                     {program.output<float>("origins"), program.output<float>("directions"),
                      program.output<float>("radii"), program.output<float>("near"),
                      program.output<float>("far"), program.output<float>("phase"),
                      program.output<float>("background"), program.output<float>("target")},
                     nullptr);
}

static void tiny_mlp(const emulation::Program& program) {
    const int parts = static_cast<int>(program.integer("parts"));
    const FastSizes sizes{
        static_cast<int>(program.size("features", 1)), static_cast<int>(program.size("density_in", 1)),
        static_cast<int>(program.size("density_in", 0)), program.has("colour_hidden") ? 2 : 1};
    const NetworkLayout layout(sizes,
                               {program.input<float>("density_in"), program.input<float>("density_out"),
                                program.input<float>("colour_in"), program.input<float>("colour_hidden"),
                                program.input<float>("colour_out")},
                               program.integer("tf32") != 0);
    float* packed = scratch<float>("packed", layout.total);
    launch_pack_networks(layout, packed, nullptr);
    const TinyMlpArguments in{program.size("features", 0), DeviceNetworks(sizes, layout, packed),
                              program.input<float>("features"), program.input<float>("harmonics"),
                              program.input<std::int64_t>("rays")};
    launch_tiny_mlp_forward(in, program.output<float>("out_rgb"), program.output<float>("out_density"),
                            nullptr);
    float* weight_parts = scratch<float>("weight_parts", parts * sizes.weights());
    launch_tiny_mlp_backward(
        in,
        {program.input<float>("cot_rgb"), program.input<float>("cot_density"),
         program.output<float>("grad_features"), program.output<float>("grad_harmonics"), weight_parts},
        parts, nullptr);
    launch_sum_parts(sizes.weights(), parts, weight_parts, program.output<float>("grad_weights"), nullptr,
                     nullptr);
}

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    const std::string kernel = program.text("kernel");
    if (kernel == "march")
        march(program);
    else if (kernel == "packed_composite")
        packed_composite(program);
    else if (kernel == "sparse_adam")
        sparse_adam(program);
    else if (kernel == "draw_rays")
        draw_rays(program);
    else if (kernel == "tiny_mlp")
        tiny_mlp(program);
    else
        emulation::fail("no kernel '%s'", kernel.c_str());
}
