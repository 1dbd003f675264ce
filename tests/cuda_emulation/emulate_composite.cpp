// The compositing kernels; driven by tests/test_composite.py.
#include "composite/composite_kernels.cuh"
#include "program.h"

using namespace mipnerf;

template <typename S>
static void run(const emulation::Program& program) {
    CompositeOptions<float> options{};
    options.background = static_cast<float>(program.integer("white_background"));
    options.density_bias = static_cast<float>(program.number("density_bias"));
    options.rgb_padding = static_cast<float>(program.number("rgb_padding"));
    const std::string density_activation = program.text("density_activation");
    options.density_activation = density_activation == "softplus" ? DensityActivation::kSoftplus
                                 : density_activation == "relu"   ? DensityActivation::kRelu
                                                                  : DensityActivation::kNone;
    options.rgb_activation =
        program.text("rgb_activation") == "sigmoid" ? RgbActivation::kSigmoid : RgbActivation::kNone;
    const CompositeArguments<S> arguments{program.size("t_vals", 0),
                                          static_cast<int>(program.size("t_vals", 1)) - 1,
                                          program.input<S>("rgb"),
                                          program.input<S>("density"),
                                          program.input<float>("t_vals"),
                                          program.input<float>("directions"),
                                          options};
    if (program.text("kernel") == "backward") {
        launch_composite_backward<S>(
            arguments,
            {program.input<float>("cot_rgb"), program.input<float>("cot_distance"),
             program.input<float>("cot_acc"), program.input<float>("cot_weights"),
             program.output<S>("grad_rgb"), program.output<S>("grad_density"),
             program.output<float>("grad_t_vals"), program.output<float>("grad_directions")},
            nullptr);
        return;
    }
    const CompositeResults results{program.output<float>("out_rgb"), program.output<float>("out_distance"),
                                   program.output<float>("out_acc"), program.output<float>("out_weights")};
    if (program.text("kernel") == "forward")
        launch_composite_forward<S>(arguments, results, nullptr);
    else
        launch_composite_resample<S>(arguments, results, static_cast<int>(program.size("out_t_vals", 1)),
                                     static_cast<float>(program.number("padding")), program.input<float>("u"),
                                     program.output<float>("out_t_vals"), nullptr);
}

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    if (program.type("rgb") == "<f4")
        run<float>(program);
    else if (program.type("rgb") == "<f2")
        run<Half>(program);
    else
        run<Bfloat16>(program);
}
