// The Python module mipnerf_fast._C. Importing it registers the operators (library.cpp); all that it offers
// itself is how it was built.
#include <pybind11/pybind11.h>

#include "common/for_rays.h"
#include "mipnerf_fast_build_info.h"  // written by setup.py

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

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native operators of mipnerf_fast; they are called as torch.ops.mipnerf_fast.<name>.";
    m.def("build_info", &build_info,
          "What was built and why: reason, torch, cuda, architectures, compilers, flags, sources, revision.");
    m.def("vector_unit", &vector_unit_name,
          "Whose copies of the loops run here: avx512, avx2 or baseline; ATEN_CPU_CAPABILITY limits it.");
}
