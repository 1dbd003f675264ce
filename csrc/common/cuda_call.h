// What the CUDA operators of the fast model need of torch to launch: the current stream, arrays on the right
// device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "checks.h"
#include "device.cuh"

namespace mipnerf {

inline Stream current_cuda_stream(const torch::stable::Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<Stream>(stream);
}

template <typename T>
const T* cuda_data(const torch::stable::Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_cuda_data(const torch::stable::Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// Checks arrays against one that says the device, and keeps contiguous copies alive.
class CudaArrays {
  public:
    using Tensor = torch::stable::Tensor;
    using ScalarType = torch::headeronly::ScalarType;

    CudaArrays(const Checker& check, const char* name, const Tensor& like)
        : check_(check), name_(name), like_(like) {}

    template <typename T>
    const T* input(const char* name, const Tensor& tensor, ScalarType dtype,
                   std::initializer_list<int64_t> shape, const char* meaning) {
        check_.shape(name, tensor, shape, meaning);
        check_.dtype(name, tensor, {dtype});
        check_.same_device(name, tensor, name_, like_);
        held_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
        return cuda_data<T>(held_.back());
    }
    const float* floats(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                        const char* meaning) {
        return input<float>(name, tensor, ScalarType::Float, shape, meaning);
    }
    // Changed in place, so it must be contiguous as it is.
    template <typename T>
    T* output(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
              const char* meaning) {
        input<T>(name, tensor, dtype, shape, meaning);
        check_.that(tensor.is_contiguous(), name, "contiguous", "a view with other strides");
        return mutable_cuda_data<T>(tensor);
    }
    // As large as another array and of floats, changed in place.
    float* floats_like(const char* name, const Tensor& tensor, const Tensor& other) const {
        check_.that(sizes_text(tensor.sizes()) == sizes_text(other.sizes()), name, sizes_text(other.sizes()),
                    sizes_text(tensor.sizes()));
        check_.dtype(name, tensor, {ScalarType::Float});
        check_.same_device(name, tensor, name_, like_);
        check_.that(tensor.is_contiguous(), name, "contiguous", "a view with other strides");
        return mutable_cuda_data<float>(tensor);
    }

  private:
    const Checker& check_;
    const char* name_;
    Tensor like_;
    std::vector<Tensor> held_;
};

// Memory for a launch; freed by torch in the order of the stream, so it may go when the operator returns.
class CudaRoom {
  public:
    explicit CudaRoom(const torch::stable::Tensor& like) : like_(like) {}
    template <typename T>
    T* take(int64_t count) {
        held_.push_back(torch::stable::new_empty(like_, {std::max<int64_t>(count, 1) * int64_t{sizeof(T)}},
                                                 torch::headeronly::ScalarType::Byte));
        return mutable_cuda_data<T>(held_.back());
    }

  private:
    torch::stable::Tensor like_;
    std::vector<torch::stable::Tensor> held_;
};

// The current device must have products in TF32 where they are asked for.
inline void check_tf32(const Checker& check, bool tf32) {
    if (!tf32) return;
    int device = 0, major = 0;
    detail::check_cuda(cudaGetDevice(&device), "check_tf32");
    detail::check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                       "check_tf32");
    check.that(major >= 8, "tf32", "false on a GPU of a compute capability below 8.0", "true");
}

// One number from the device: waits for the stream.
template <typename T>
T read_back(const T* address, Stream stream) {
    T value;
    detail::check_cuda(cudaMemcpyAsync(&value, address, sizeof(T), cudaMemcpyDeviceToHost, stream),
                       "read_back");
    detail::check_cuda(cudaStreamSynchronize(stream), "read_back");
    return value;
}

}  // namespace mipnerf
