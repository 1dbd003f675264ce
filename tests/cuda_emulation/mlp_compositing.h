// What the programs of both generations of the fused network are told of compositing. To be included after
// the kernels, which may be those of a copy with faults.
#pragma once

#include "program.h"

namespace mipnerf::emulation {

inline MlpCompositing compositing(const Program& program) {
    MlpCompositing of{};
    of.options.background = static_cast<float>(program.integer("white_background"));
    of.options.density_bias = static_cast<float>(program.number("density_bias"));
    of.options.rgb_padding = static_cast<float>(program.number("rgb_padding"));
    of.options.density_activation = static_cast<DensityActivation>(program.integer("density_activation"));
    of.options.rgb_activation = static_cast<RgbActivation>(program.integer("rgb_activation"));
    of.results = {program.output<float>("pixels"), program.output<float>("distance"),
                  program.output<float>("acc"), program.output<float>("weights")};
    return of;
}

}  // namespace mipnerf::emulation
