// The kernels of frustum_ipe, forward and backward; driven by tests/test_frustum_ipe.py.
#include "frustum_ipe/frustum_ipe_kernels.cuh"
#include "program.h"

using mipnerf::Bfloat16;
using mipnerf::FrustumIpeGradients;
using mipnerf::FrustumIpeInputs;
using mipnerf::Half;
using mipnerf::emulation::Program;

template <typename Out>
static void run(const Program& program, const FrustumIpeInputs& inputs) {
    if (program.has("features"))
        mipnerf::launch_frustum_ipe_forward(inputs, program.output<Out>("features"), nullptr);
    if (program.has("grad_features"))
        mipnerf::launch_frustum_ipe_backward(
            inputs, program.input<Out>("grad_features"),
            FrustumIpeGradients{program.output<float>("grad_t_vals"), program.output<float>("grad_origins"),
                                program.output<float>("grad_directions"),
                                program.output<float>("grad_radii")},
            nullptr);
}

int main(int argc, char** argv) {
    const Program program(argc, argv);
    FrustumIpeInputs inputs;
    inputs.t_vals = program.input<float>("t_vals");
    inputs.origins = program.input<float>("origins");
    inputs.directions = program.input<float>("directions");
    inputs.radii = program.input<float>("radii");
    inputs.rays = program.size("t_vals", 0);
    inputs.intervals = program.size("t_vals", 1) - 1;
    inputs.min_deg = static_cast<int>(program.integer("min_deg"));
    inputs.degrees = static_cast<int>(program.integer("max_deg")) - inputs.min_deg;
    inputs.cylinder = program.integer("cylinder") != 0;
    inputs.integrated = program.integer("integrated") != 0;
    const std::string type = program.type(program.has("features") ? "features" : "grad_features");
    if (type == "<f4")
        run<float>(program, inputs);
    else if (type == "<f2")
        run<Half>(program, inputs);
    else
        run<Bfloat16>(program, inputs);
}
