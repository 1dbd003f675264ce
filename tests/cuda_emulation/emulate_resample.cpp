// The resampling kernel; driven by tests/test_resample.py.
#include "program.h"
#include "resample/resample_kernels.cuh"

int main(int argc, char** argv) {
    const mipnerf::emulation::Program program(argc, argv);
    mipnerf::launch_resample<float>(
        program.size("t_vals", 0), static_cast<int>(program.size("t_vals", 1)) - 1,
        static_cast<int>(program.size("out_t_vals", 1)), static_cast<float>(program.number("padding")),
        program.input<float>("t_vals"), program.input<float>("weights"), program.input<float>("u"),
        program.output<float>("out_t_vals"), nullptr);
}
