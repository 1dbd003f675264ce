// The kernels of the fast model's training step, of its rendering and of its occupancy grid; driven by
// tests/test_fast_kernels.py.
#include "fast_step/fast_render.cuh"
#include "fast_step/fast_step_kernels.cuh"
#include "march/march_kernels.cuh"
#include "occupancy/occupancy_kernels.cuh"
#include "program.h"
#include "tiny_mlp/tiny_mlp_kernels.cuh"

using namespace mipnerf;

// What the tables are of is said when this is compiled: an instance takes longer than all the rest.
#ifndef MIPNERF_TABLES
#define MIPNERF_TABLES float
#define MIPNERF_FEATURES 4
#endif

static float number(const emulation::Program& program, const char* name) {
    return static_cast<float>(program.number(name));
}
template <typename T>
static T* scratch(const char* name, std::int64_t count) {
    return static_cast<T*>(emulation::allocate(name, static_cast<std::size_t>(count) * sizeof(T), 0));
}

// What the program is given of a model; `packed` is filled by a launch.
template <typename S>
struct Given {
    FastSizes sizes;
    NetworkLayout layout;
    DeviceModel<S> model{};

    explicit Given(const emulation::Program& program)
        : sizes{static_cast<int>(program.size("resolutions", 0) * program.size("tables", 1)),
                static_cast<int>(program.size("density_in", 1)),
                static_cast<int>(program.size("density_in", 0)), program.has("colour_hidden") ? 2 : 1},
          layout(sizes,
                 {program.input<float>("density_in"), program.input<float>("density_out"),
                  program.input<float>("colour_in"), program.input<float>("colour_hidden"),
                  program.input<float>("colour_out")},
                 program.integer("tf32") != 0) {
        model.grid =
            hash_grid(program.input<std::int64_t>("resolutions"),
                      static_cast<int>(program.size("resolutions", 0)), program.integer("table_size"));
        model.encode = {static_cast<Attenuation>(program.integer("attenuation")), number(program, "cutoff"),
                        program.integer("scale_input") != 0, number(program, "scale_low"),
                        number(program, "scale_high")};
        model.tables = program.input<S>("tables");
    }
    void pack(float* packed) {
        launch_pack_networks(layout, packed, nullptr);
        model.networks = DeviceNetworks(sizes, layout, packed);
    }
};

static MarchArguments march_arguments(const emulation::Program& program) {
    MarchArguments in{};
    in.rays = program.size("origins", 0);
    in.active_rays = program.input<std::int32_t>("active_rays");
    in.options = {number(program, "box_half"), number(program, "step_scale"), number(program, "min_step"),
                  number(program, "max_step"),
                  static_cast<std::int32_t>(program.integer("occupancy_resolution"))};
    in.layout = occupancy_layout(in.options.resolution);
    in.masks = program.input<std::uint32_t>("masks");
    in.origins = program.input<float>("origins");
    in.directions = program.input<float>("directions");
    in.radii = program.input<float>("radii");
    in.near = program.input<float>("near");
    in.far = program.input<float>("far");
    in.phase = program.input<float>("phase");
    return in;
}

template <typename S, int F>
static void render(const emulation::Program& program) {
    Given<S> given(program);
    given.pack(scratch<float>("packed", given.layout.total));
    launch_fast_render<S, F>(given.model, march_arguments(program),
                             {program.input<float>("background"), program.output<float>("out_rgb"),
                              program.output<float>("out_distance"), program.output<float>("out_acc"),
                              program.output<std::int32_t>("next_ray")},
                             static_cast<int>(program.integer("blocks")), nullptr);
}

template <typename S, int F>
static void step(const emulation::Program& program) {
    Given<S> given(program);
    const MarchArguments rays = march_arguments(program);
    std::size_t bytes = 0;
    const auto lay_out = [&](unsigned char* base) {
        return StepScratch::lay_out(base, given.sizes, given.layout.total, sizeof(S), rays.rays,
                                    program.integer("capacity"), static_cast<int>(program.integer("parts")),
                                    bytes);
    };
    lay_out(nullptr);
    const StepScratch s = lay_out(scratch<unsigned char>("scratch", static_cast<std::int64_t>(bytes)));
    given.pack(s.packed);
    launch_step_march(rays, s, nullptr);
    launch_train_step<S, F>(
        given.model, rays,
        {program.input<float>("background"), program.input<float>("target"), number(program, "beta")}, s,
        program.output<float>("grad_tables"), program.output<std::int64_t>("table_sums"),
        {program.output<float>("grad_density_in"), program.output<float>("grad_density_out"),
         program.output<float>("grad_colour_in"), program.output<float>("grad_colour_hidden"),
         program.output<float>("grad_colour_out")},
        program.output<double>("statistics"), nullptr);
}

template <typename S, int F>
static void visits(const emulation::Program& program) {
    Given<S> given(program);
    given.pack(scratch<float>("packed", given.layout.total));
    const auto R = static_cast<std::int32_t>(program.integer("occupancy_resolution"));
    const std::int64_t chunks = occupancy_chunks(R);
    launch_occupancy_visits<S, F>(
        given.model,
        {R,
         static_cast<std::uint64_t>(program.integer("seed")),
         static_cast<std::uint64_t>(program.integer("step")),
         program.input<std::int64_t>("step_on_device"),
         program.integer("visits"),
         number(program, "cell_scale"),
         number(program, "decay"),
         program.output<float>("densities"),
         {chunks, program.input<std::uint32_t>("masks"), scratch<std::int32_t>("counts", chunks),
          scratch<std::int32_t>("totals", ray_blocks(chunks)), scratch<std::int64_t>("starts", chunks + 1)}},
        nullptr);
}

template <typename S, int F>
static void run(const emulation::Program& program) {
    if (program.size("tables", 1) != F) emulation::fail("this program is of %d features", F);
    const std::string kernel = program.text("kernel");
    if (kernel == "step")
        step<S, F>(program);
    else if (kernel == "render")
        render<S, F>(program);
    else
        visits<S, F>(program);
}

static void masks(const emulation::Program& program) {
    const auto R = static_cast<std::int32_t>(program.size("densities", 0));
    launch_occupancy_masks({R, occupancy_layout(R), number(program, "max_threshold"),
                            program.input<float>("densities"), program.output<std::uint32_t>("out_masks"),
                            scratch<float>("parts", kDensityParts), scratch<float>("threshold", 1),
                            scratch<std::int32_t>("occupied", 1), program.output<double>("summary")},
                           nullptr);
}

static void pace(const emulation::Program& program) {
    launch_step_pace(
        program.input<double>("statistics"),
        {program.output<float>("samples_per_ray"), program.output<std::int32_t>("active_rays"),
         program.output<std::int64_t>("step"), number(program, "batch"),
         static_cast<int>(program.integer("least")), static_cast<int>(program.integer("most")), 64},
        nullptr);
}

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    if (program.text("kernel") == "masks")
        masks(program);
    else if (program.text("kernel") == "pace")
        pace(program);
    else
        run<MIPNERF_TABLES, MIPNERF_FEATURES>(program);
}
