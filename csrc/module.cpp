// The Python module mipnerf_fast._C. Importing it registers the operators (library.cpp); all that it offers
// itself is how it was built.
#include <pybind11/pybind11.h>

#include "mipnerf_fast_build_info.h"  // written by setup.py

namespace py = pybind11;

static py::object build_info() {
    return py::module_::import("json").attr("loads")(kBuildInfo);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native operators of mipnerf_fast; they are called as torch.ops.mipnerf_fast.<name>.";
    m.def("build_info", &build_info,
          "What was built and why: reason, torch, cuda, architectures, compilers, flags, sources, revision.");
}
