// A test program of the emulation: arrays in, kernels, arrays out.
//
//   int main(int argc, char** argv) {
//     mipnerf::emulation::Program program(argc, argv);
//     const float* x = program.input<float>("x");          // nullptr when the caller gave none
//     float* y = program.output<float>("y");               // as large as the caller asked, 0xff bytes or the
//     caller's values MIPNERF_LAUNCH(double_kernel, grid_size(program.size("x", 0)), dim3(32), 0, nullptr, x,
//     y);
//   }                                                      // the destructor writes the outputs
//
// tests/cuda_emulation/harness.py builds and runs such programs. Types: float, double, Bfloat16 (numpy
// uint16), Half (numpy float16), int and unsigned of 8, 32 and 64 bits.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/device.cuh"

namespace mipnerf::emulation {

struct ArrayRecord {
    std::string type;  // as numpy writes it: <f4
    std::vector<std::int64_t> shape;
    std::size_t bytes = 0;
    void* data = nullptr;
    bool is_output = false;
};

template <typename T>
const char* type_name();
template <>
inline const char* type_name<float>() {
    return "<f4";
}
template <>
inline const char* type_name<double>() {
    return "<f8";
}
template <>
inline const char* type_name<Half>() {
    return "<f2";
}
template <>
inline const char* type_name<Bfloat16>() {
    return "<u2";
}
template <>
inline const char* type_name<std::int8_t>() {
    return "|i1";
}
template <>
inline const char* type_name<std::uint8_t>() {
    return "|u1";
}
template <>
inline const char* type_name<std::int32_t>() {
    return "<i4";
}
template <>
inline const char* type_name<std::uint32_t>() {
    return "<u4";
}
template <>
inline const char* type_name<std::int64_t>() {
    return "<i8";
}
template <>
inline const char* type_name<std::uint64_t>() {
    return "<u8";
}

class Program {
  public:
    Program(int argc, char** argv);  // INPUT_FILE OUTPUT_FILE SEED name=value...
    ~Program();
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    bool has(const std::string& name) const { return arrays_.count(name) != 0; }
    std::int64_t size(const std::string& name, std::size_t dimension) const;
    std::string type(const std::string& name) const;  // as numpy writes it
    template <typename T>
    const T* input(const std::string& name) const {
        return has(name) ? static_cast<const T*>(find(name, type_name<T>(), false)) : nullptr;
    }
    template <typename T>
    T* output(const std::string& name) const {
        return has(name) ? static_cast<T*>(find(name, type_name<T>(), true)) : nullptr;
    }

    std::int64_t integer(const std::string& name) const;
    double number(const std::string& name) const;
    std::string text(const std::string& name) const;

  private:
    void* find(const std::string& name, const char* type, bool is_output) const;

    std::string output_path_;
    std::map<std::string, ArrayRecord> arrays_;
    std::map<std::string, std::string> scalars_;
};

}  // namespace mipnerf::emulation
