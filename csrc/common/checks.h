// Argument checks of the operators, over torch's stable C++ interface. Every message names the operator, the
// argument, what was wanted and what was given; it reaches Python as RuntimeError.
//
//   const Checker check{"frustum_ipe"};
//   check.dims("t_vals", t_vals, 2, "[B, N+1]");
//   check.shape("origins", origins, {rays, 3}, "[B, 3]");
//   check.dtype("t_vals", t_vals, {ScalarType::Float});
//   check.same_dtype("origins", origins, "t_vals", t_vals);
//   check.same_device("origins", origins, "t_vals", t_vals);
//   check.that(min_deg >= 0, "min_deg", "0 or more", min_deg);
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mipnerf {

template <typename Sizes>
inline std::string sizes_text(const Sizes& sizes) {
    std::ostringstream text;
    text << '[';
    const char* separator = "";
    for (const int64_t size : sizes) {
        text << separator << size;
        separator = ", ";
    }
    text << ']';
    return text.str();
}

inline const char* dtype_text(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline std::string device_text(const torch::stable::Tensor& tensor) {
    if (tensor.is_cpu()) return "cpu";
    const std::string index = std::to_string(tensor.get_device_index());
    if (tensor.is_cuda()) return "cuda:" + index;
    return "device type " + std::to_string(static_cast<int>(tensor.device().type())) + ":" + index;
}

// The messages are put together only where something is wrong: a call on a few rays takes as long as some of
// them.
struct Checker {
    using Tensor = torch::stable::Tensor;
    using ScalarType = torch::headeronly::ScalarType;

    const char* op;

    template <typename Got>
    void that(bool holds, const char* argument, const std::string& wanted, const Got& got) const {
        if (holds) return;
        std::ostringstream message;  // torch's own macro would put the path of this file in front
        message << op << ": " << argument << " must be " << wanted << ", got " << got;
        throw std::runtime_error(message.str());
    }

    void dims(const char* argument, const Tensor& tensor, int64_t wanted, const char* meaning) const {
        if (tensor.dim() == wanted) return;
        that(false, argument, std::string("of shape ") + meaning, sizes_text(tensor.sizes()));
    }

    void shape(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> wanted,
               const char* meaning) const {
        bool equal = tensor.dim() == static_cast<int64_t>(wanted.size());
        int64_t axis = 0;
        for (const int64_t size : wanted) equal = equal && tensor.size(axis++) == size;
        if (equal) return;
        that(false, argument, "of shape " + sizes_text(wanted) + " (" + meaning + ")",
             sizes_text(tensor.sizes()));
    }

    void dtype(const char* argument, ScalarType got, std::initializer_list<ScalarType> allowed) const {
        if (std::find(allowed.begin(), allowed.end(), got) != allowed.end()) return;
        std::string names;
        for (const ScalarType candidate : allowed)
            names += (names.empty() ? "" : " or ") + std::string(dtype_text(candidate));
        that(false, argument, names, dtype_text(got));
    }

    void dtype(const char* argument, const Tensor& tensor, std::initializer_list<ScalarType> allowed) const {
        dtype(argument, tensor.scalar_type(), allowed);
    }

    void same_dtype(const char* argument, const Tensor& tensor, const char* other_argument,
                    const Tensor& other) const {
        if (tensor.scalar_type() == other.scalar_type()) return;
        that(false, argument, std::string(dtype_text(other.scalar_type())) + " as " + other_argument,
             dtype_text(tensor.scalar_type()));
    }

    void same_device(const char* argument, const Tensor& tensor, const char* other_argument,
                     const Tensor& other) const {
        if (tensor.device() == other.device()) return;
        that(false, argument, "on " + device_text(other) + " as " + other_argument, device_text(tensor));
    }
};

}  // namespace mipnerf
