// The kernel of ray_batch, and twins of it with one fault each; driven by tests/test_ray_batch.py.
#include "program.h"
#include "ray_batch/ray_batch_kernels.cuh"

using namespace mipnerf;

// Fault 1: one ray too many. Fault 2: two threads write the same ray. Fault 3: half of the step's bits.
template <int Fault>
__global__ void broken_ray_batch_kernel(RayBatchArguments in, RayBatchOutputs out) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const std::int64_t step = Fault == 3 ? static_cast<std::int32_t>(*in.step) : *in.step;
    if (Fault == 1 ? row <= in.count : row < in.count)
        write_batch_ray(in, out, static_cast<std::uint64_t>(step), Fault == 2 ? row / 2 : row);
}

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    RayBatchArguments in{};
    in.count = program.size("origins", 0);
    in.seed = static_cast<std::uint64_t>(program.integer("seed"));
    in.step = program.input<std::int64_t>("step");
    in.single_image = program.integer("single_image") != 0;
    in.background = static_cast<float>(program.integer("white_background"));
    in.images = program.size("heights", 0);
    in.all_pixels = program.size("pixels", 0);
    in.common_size = program.integer("common_size");
    in.channels = static_cast<int>(program.size("pixels", 1));
    in.pixels = program.input<std::uint8_t>("pixels");
    in.offsets = program.input<std::int64_t>("offsets");
    in.heights = program.input<std::int64_t>("heights");
    in.widths = program.input<std::int64_t>("widths");
    in.c2w = program.input<float>("c2w");
    in.focals = program.input<float>("focals");
    in.nears = program.input<float>("nears");
    in.fars = program.input<float>("fars");
    in.lossmults = program.input<float>("lossmults");
    const RayBatchOutputs out{program.output<float>("origins"),  program.output<float>("directions"),
                              program.output<float>("viewdirs"), program.output<float>("radii"),
                              program.output<float>("near"),     program.output<float>("far"),
                              program.output<float>("lossmult"), program.output<float>("target")};
    const std::int64_t fault = program.integer("fault");
    if (fault == 0) return launch_ray_batch(in, out, nullptr), 0;
    const auto kernel = fault == 1   ? broken_ray_batch_kernel<1>
                        : fault == 2 ? broken_ray_batch_kernel<2>
                                     : broken_ray_batch_kernel<3>;
    MIPNERF_LAUNCH(kernel, grid_size(in.count / 32 + 1), dim3(32), 0, nullptr, in, out);
}
