// The Python module mipnerf_fast._C. Importing it registers the operators (library.cpp); all that it offers
// itself is how it was built, and how large the fused network's buffers are.

// Nothing here is worth optimising, and it would double the time that pybind11's templates take.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O0")
#endif

#include <pybind11/pybind11.h>

#include "common/for_rays.h"
#include "mipnerf_fast_build_info.h"  // written by setup.py
#include "mlp/mlp_hopper_plan.h"
#include "mlp/mlp_schedule.h"

namespace py = pybind11;

static py::object build_info() {
    return py::module_::import("json").attr("loads")(kBuildInfo);
}

static const char* vector_unit_name() {
    switch (mipnerf::vector_unit()) {
        case mipnerf::VectorUnit::kAvx512:
            return "avx512";
        case mipnerf::VectorUnit::kAvx2:
            return "avx2";
        default:
            return "baseline";
    }
}

static py::dict mlp_sizes(int features, int width, int depth, int skip_layer, int view_width, int view_depth,
                          bool hopper) {
    const mipnerf::MlpPlan plan =
        mipnerf::make_mlp_plan({features, width, depth, skip_layer, view_depth > 0, view_width, view_depth});
    constexpr int kSamples = mipnerf::mlp_mma::kTileRows;
    const mipnerf::MlpSizes sizes =
        hopper ? mipnerf::mlp_hopper::sizes_of(plan, kSamples) : mipnerf::mlp_mma::mlp_sizes(plan, kSamples);
    py::dict result;
    result["gradients"] = plan.gradients;
    result["packed"] = sizes.packed;
    result["activations"] = sizes.activations;
    result["masks"] = sizes.masks;
    return result;
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native operators of mipnerf_fast; they are called as torch.ops.mipnerf_fast.<name>.";
    m.def("build_info", &build_info,
          "What was built and why: reason, torch, cuda, architectures, compilers, flags, sources, revision, "
          "vector_units.");
    m.def("vector_unit", &vector_unit_name,
          "Whose copies of the loops run here: avx512, avx2 or baseline; ATEN_CPU_CAPABILITY limits it.");
    m.def("mlp_sizes", &mlp_sizes, py::arg("features"), py::arg("width"), py::arg("depth"),
          py::arg("skip_layer"), py::arg("view_width"), py::arg("view_depth"), py::arg("hopper") = false,
          "The floats of the fused network's parameters, and the bytes of its packed weights, and of the "
          "activations and masks of every 128 samples.");
}
