// The kernel of counter_words; driven by tests/test_counter_rng.py.
#include "counter_words/counter_words_kernels.cuh"
#include "program.h"

int main(int argc, char** argv) {
    const mipnerf::emulation::Program program(argc, argv);
    mipnerf::launch_counter_words(
        program.size("rows", 0), program.size("words", 1), static_cast<std::uint64_t>(program.number("seed")),
        program.input<std::int64_t>("step"), static_cast<std::uint32_t>(program.number("stream")),
        program.input<std::int64_t>("rows"), program.output<std::int64_t>("words"), nullptr);
}
