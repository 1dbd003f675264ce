// One matrix product through cuBLASLt, with the epilogues of the network's layers; see
// mipnerf_fast/ops/gemm.py. Host code: it needs cuBLASLt's header, so it is built only where the CUDA sources
// are.
//
// Matrices are row-major here and column-major there: out = op(a) op(b) is asked for as out^T = op(b)^T
// op(a)^T, whose columns are the rows of out. So cuBLASLt's A is b and its B is a, its rows are the columns
// of out (a bias has one entry for each), and its "gradient of the bias of B" sums the columns of a.
//
// Of the epilogues cuBLASLt has few algorithms on older GPUs (a ReLU's mask and its backward pass, say), and
// which, only it can tell. Where it has none the operator writes nothing and returns false; gemm.py then asks
// for the plain product and does the rest itself.
#include <cublasLt.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "../common/checks.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As mipnerf_fast/ops/gemm.py numbers them.
constexpr std::array<cublasLtEpilogue_t, 8> kEpilogues = {
    CUBLASLT_EPILOGUE_DEFAULT,   CUBLASLT_EPILOGUE_BIAS,     CUBLASLT_EPILOGUE_RELU,
    CUBLASLT_EPILOGUE_RELU_BIAS, CUBLASLT_EPILOGUE_RELU_AUX, CUBLASLT_EPILOGUE_RELU_AUX_BIAS,
    CUBLASLT_EPILOGUE_DRELU,     CUBLASLT_EPILOGUE_BGRADB};
constexpr std::array<const char*, 8> kEpilogueNames = {
    "none",        "bias",       "ReLU", "bias and ReLU", "ReLU and mask", "bias, ReLU and mask",
    "ReLU's mask", "column sums"};
constexpr std::array<bool, 8> kTakesVector = {false, true, false, true, false, true, false, true};
constexpr std::array<bool, 8> kTakesMask = {false, false, false, false, true, true, true, false};
constexpr int64_t kColumnSums = 7;
constexpr int64_t kMaskRowBits = 128;

void check_status(cublasStatus_t status, const std::string& what) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    throw std::runtime_error("gemm_cublaslt: " + what + ": " + cublasLtGetStatusString(status));
}

cudaDataType_t cuda_type(ScalarType type) {
    if (type == ScalarType::BFloat16) return CUDA_R_16BF;
    return type == ScalarType::Half ? CUDA_R_16F : CUDA_R_32F;
}

// cuBLASLt's descriptors, destroyed at the end of their scope.
class MatmulDescription {
  public:
    MatmulDescription() {
        check_status(cublasLtMatmulDescCreate(&value_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a description");
    }
    ~MatmulDescription() { cublasLtMatmulDescDestroy(value_); }
    MatmulDescription(const MatmulDescription&) = delete;
    MatmulDescription& operator=(const MatmulDescription&) = delete;

    template <typename T>
    void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
        check_status(cublasLtMatmulDescSetAttribute(value_, attribute, &value, sizeof(value)),
                     "an attribute");
    }
    cublasLtMatmulDesc_t get() const { return value_; }

  private:
    cublasLtMatmulDesc_t value_ = nullptr;
};

class Layout {
  public:
    Layout(const Tensor& matrix) {
        check_status(cublasLtMatrixLayoutCreate(&value_, cuda_type(matrix.scalar_type()), matrix.size(1),
                                                matrix.size(0), matrix.stride(0)),
                     "a layout");
    }
    ~Layout() { cublasLtMatrixLayoutDestroy(value_); }
    Layout(const Layout&) = delete;
    Layout& operator=(const Layout&) = delete;
    cublasLtMatrixLayout_t get() const { return value_; }

  private:
    cublasLtMatrixLayout_t value_ = nullptr;
};

class Preference {
  public:
    Preference() { check_status(cublasLtMatmulPreferenceCreate(&value_), "a preference"); }
    ~Preference() { cublasLtMatmulPreferenceDestroy(value_); }
    Preference(const Preference&) = delete;
    Preference& operator=(const Preference&) = delete;

    template <typename T>
    void set(cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
        check_status(cublasLtMatmulPreferenceSetAttribute(value_, attribute, &value, sizeof(value)),
                     "a preference");
    }
    cublasLtMatmulPreference_t get() const { return value_; }

  private:
    cublasLtMatmulPreference_t value_ = nullptr;
};

// The largest power of two up to 256 that divides an address.
uint32_t alignment_of(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    uint32_t alignment = 256;
    while (address % alignment != 0) alignment /= 2;
    return alignment;
}

// Everything that cuBLASLt's choice of an algorithm depends on: of the mask and the vector it looks at how
// the pointers are aligned.
using Key = std::array<int64_t, 20>;

// Nothing where cuBLASLt has no algorithm; asked once for every key.
std::optional<cublasLtMatmulAlgo_t> choose(cublasLtHandle_t handle, const MatmulDescription& description,
                                           const Layout& a, const Layout& b, const Layout& out,
                                           const Preference& preference, const Key& key) {
    static std::mutex mutex;
    static std::map<Key, std::optional<cublasLtMatmulAlgo_t>> chosen;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = chosen.find(key);
    if (found != chosen.end()) return found->second;
    cublasLtMatmulHeuristicResult_t result{};
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle, description.get(), a.get(), b.get(), out.get(), out.get(),
                                       preference.get(), 1, &result, &count);
    std::optional<cublasLtMatmulAlgo_t> algorithm;
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) {
        check_status(status, "choosing an algorithm");
        if (count > 0) algorithm = result.algo;
    }
    chosen.emplace(key, algorithm);
    return algorithm;
}

void check_matrix(const Checker& check, const char* argument, const Tensor& matrix, int64_t rows,
                  int64_t columns, const Tensor& a) {
    check.shape(argument, matrix, {rows, columns}, "rows, columns");
    check.same_device(argument, matrix, "a", a);
    check.that(matrix.stride(1) == 1 && matrix.stride(0) >= columns, argument, "with contiguous rows",
               "strides " + sizes_text(matrix.strides()));
}

bool gemm_cublaslt(Tensor a, Tensor b, Tensor out, bool transpose_a, bool transpose_b, double beta,
                   int64_t epilogue, std::optional<Tensor> vector, std::optional<Tensor> mask,
                   Tensor workspace) {
    const Checker check{"gemm_cublaslt"};
    check.dims("a", a, 2, "[rows, columns]");
    check.dims("b", b, 2, "[rows, columns]");
    check.dims("out", out, 2, "[rows, columns]");
    check.dtype("a", a, {ScalarType::BFloat16, ScalarType::Half});
    check.same_dtype("b", b, "a", a);
    check.dtype("out", out, {ScalarType::Float, a.scalar_type()});
    check.that(epilogue >= 0 && epilogue < static_cast<int64_t>(kEpilogues.size()), "epilogue", "0 to 7",
               epilogue);
    const int64_t rows = a.size(transpose_a ? 1 : 0);
    const int64_t inner = a.size(transpose_a ? 0 : 1);
    const int64_t columns = b.size(transpose_b ? 0 : 1);
    check_matrix(check, "a", a, transpose_a ? inner : rows, transpose_a ? rows : inner, a);
    check_matrix(check, "b", b, transpose_b ? columns : inner, transpose_b ? inner : columns, a);
    check_matrix(check, "out", out, rows, columns, a);
    check.that(vector.has_value() == kTakesVector[epilogue], "vector",
               "there exactly where the epilogue takes one", vector.has_value());
    check.that(mask.has_value() == kTakesMask[epilogue], "mask", "there exactly where the epilogue takes one",
               mask.has_value());
    if (vector.has_value()) {
        check.shape("vector", *vector, {epilogue == kColumnSums ? rows : columns}, "one entry a column");
        check.same_dtype("vector", *vector, "out", out);
        check.same_device("vector", *vector, "a", a);
        check.that(vector->is_contiguous(), "vector", "contiguous", vector->stride(0));
    }
    if (mask.has_value()) {
        check.dims("mask", *mask, 2, "[rows, bytes]");
        check.dtype("mask", *mask, {ScalarType::Byte});
        const int64_t bytes = (columns + kMaskRowBits - 1) / kMaskRowBits * kMaskRowBits / 8;
        check_matrix(check, "mask", *mask, rows, bytes, a);
    }
    check.same_device("workspace", workspace, "a", a);
    check.that(workspace.is_contiguous(), "workspace", "contiguous", sizes_text(workspace.strides()));
    if (rows == 0 || columns == 0 || inner == 0) {
        check.that(rows == 0 || columns == 0, "a", "of at least one sample", sizes_text(a.sizes()));
        return true;
    }

    const int32_t device = a.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* handle = nullptr;  // a cuBLAS handle is a cuBLASLt handle too
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

    MatmulDescription description;
    description.set(CUBLASLT_MATMUL_DESC_TRANSA, transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    description.set(CUBLASLT_MATMUL_DESC_TRANSB, transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    description.set(CUBLASLT_MATMUL_DESC_EPILOGUE, kEpilogues[epilogue]);
    if (vector.has_value()) {
        description.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector->mutable_data_ptr());
        description.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                        static_cast<int32_t>(cuda_type(vector->scalar_type())));
    }
    if (mask.has_value()) {
        description.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, mask->mutable_data_ptr());
        description.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, static_cast<int64_t>(8 * mask->stride(0)));
    }
    const Layout layout_a(b), layout_b(a), layout_out(out);
    const std::array<uint32_t, 3> alignments = {alignment_of(b.const_data_ptr()),
                                                alignment_of(a.const_data_ptr()),
                                                alignment_of(out.const_data_ptr())};
    const auto workspace_bytes = static_cast<uint64_t>(workspace.numel()) * workspace.element_size();
    Preference preference;
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments[0]);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments[1]);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments[2]);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments[2]);
    const Key key = {columns,
                     rows,
                     inner,
                     b.stride(0),
                     a.stride(0),
                     out.stride(0),
                     transpose_a,
                     transpose_b,
                     static_cast<int64_t>(a.scalar_type()),
                     static_cast<int64_t>(out.scalar_type()),
                     epilogue,
                     beta != 0,
                     alignments[0],
                     alignments[1],
                     alignments[2],
                     vector.has_value() ? alignment_of(vector->const_data_ptr()) : 0,
                     mask.has_value() ? alignment_of(mask->const_data_ptr()) : 0,
                     mask.has_value() ? mask->stride(0) : 0,
                     static_cast<int64_t>(workspace_bytes),
                     device};
    const auto lt = static_cast<cublasLtHandle_t>(handle);
    const std::optional<cublasLtMatmulAlgo_t> algorithm =
        choose(lt, description, layout_a, layout_b, layout_out, preference, key);
    if (!algorithm.has_value()) return false;
    const float one = 1.0f;
    const auto scale = static_cast<float>(beta);
    check_status(
        cublasLtMatmul(lt, description.get(), &one, b.const_data_ptr(), layout_a.get(), a.const_data_ptr(),
                       layout_b.get(), &scale, out.const_data_ptr(), layout_out.get(), out.mutable_data_ptr(),
                       layout_out.get(), &*algorithm, workspace.mutable_data_ptr(), workspace_bytes,
                       static_cast<cudaStream_t>(stream)),
        std::string("a product with the epilogue \"") + kEpilogueNames[epilogue] + '"');
    return true;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("gemm_cublaslt", TORCH_BOX(&mipnerf::gemm_cublaslt));
}
