// The kernels of the hash encoding; driven by tests/test_fast_kernels.py and
// tests/test_fast_deterministic.py.
#include "hash_encode/hash_encode_kernels.cuh"
#include "program.h"

using namespace mipnerf;

template <int F>
static void run(const emulation::Program& program) {
    const auto* resolutions = program.input<std::int64_t>("resolutions");
    const HashEncodeArguments in{program.size("points", 0),
                                 hash_grid(resolutions, static_cast<int>(program.size("resolutions", 0)),
                                           program.integer("table_size")),
                                 static_cast<Attenuation>(program.integer("attenuation")),
                                 static_cast<float>(program.number("cutoff")),
                                 program.input<float>("points"),
                                 program.input<float>("scales"),
                                 program.input<float>("tables")};
    launch_hash_encode_forward<F>(in, program.output<float>("features"), nullptr);
    launch_hash_encode_backward<F>(
        in, program.input<float>("grad_features"),
        {program.output<float>("grad_points"), program.output<float>("grad_scales"),
         program.output<float>("grad_tables"), program.output<std::int64_t>("table_sums"),
         program.output<std::uint32_t>("largest")},
        nullptr);
}

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    program.size("tables", 1) == 2 ? run<2>(program) : run<4>(program);
}
