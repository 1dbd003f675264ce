// csrc/mlp/gemm_cublaslt.cpp as it is, over a cuBLASLt of the CPU, registered for CPU tensors.
//
// Matrices are column-major, operations and epilogues as NVIDIA's cuBLAS documentation defines them, sums are
// float. What real cuBLASLt demands is demanded: sizes that fit, leading dimensions, attributes of the right
// size, a mask whose rows are multiples of 128 bits, pointers aligned as was promised when the algorithm was
// chosen, an algorithm only for what it was chosen for. Whatever does not hold is INVALID_VALUE.

// What torch has for an accelerator alone, under names of its own.
#define aoti_torch_create_device_guard cublaslt_on_cpu_create_device_guard
#define aoti_torch_delete_device_guard cublaslt_on_cpu_delete_device_guard
#define torch_get_current_cuda_blas_handle cublaslt_on_cpu_blas_handle
#define aoti_torch_get_current_cuda_stream cublaslt_on_cpu_stream

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

// The registration at the file's end is then one for the CPU.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
#include "mlp/gemm_cublaslt.cpp"

#include <atomic>
#include <cstring>
#include <functional>
#include <vector>

struct cublasLtMatmulDescOpaque_t {
    std::int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N, bias_type = -1;
    std::uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr, *mask = nullptr;
    std::int64_t mask_leading = 0;
};
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType_t type;
    std::int64_t rows, columns, leading;
};
struct cublasLtMatmulPreferenceOpaque_t {
    std::uint64_t workspace = 0;
    std::uint32_t alignments[4] = {256, 256, 256, 256};  // of A, B, C, D; cuBLASLt's default
};

namespace {

std::atomic<int> alive{0};
std::atomic<std::uint32_t> refused{0};  // a bit for each epilogue as gemm.py numbers them
int handle_object, stream_object;

template <typename T>
T read(const void* matrix, std::int64_t at) {
    T value;
    std::memcpy(&value, static_cast<const char*>(matrix) + at * static_cast<std::int64_t>(sizeof(T)),
                sizeof(T));
    return value;
}

template <typename T>
void write(void* matrix, std::int64_t at, T value) {
    std::memcpy(static_cast<char*>(matrix) + at * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
}

float load(cudaDataType_t type, const void* matrix, std::int64_t at) {
    if (type == CUDA_R_32F) return read<float>(matrix, at);
    if (type == CUDA_R_16F) return static_cast<float>(read<c10::Half>(matrix, at));
    return static_cast<float>(read<c10::BFloat16>(matrix, at));
}

void store(cudaDataType_t type, void* matrix, std::int64_t at, float value) {
    if (type == CUDA_R_32F)
        write(matrix, at, value);
    else if (type == CUDA_R_16F)
        write(matrix, at, c10::Half(value));
    else
        write(matrix, at, c10::BFloat16(value));
}

bool is_aligned(const void* pointer, std::uint64_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// The value of an attribute, where it has the size that the documentation gives it.
template <typename T>
cublasStatus_t take(T& place, const void* value, size_t bytes) {
    if (bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&place, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T, typename... Arguments>
cublasStatus_t create(T** place, Arguments... arguments) {
    *place = new T{arguments...};
    ++alive;
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
cublasStatus_t destroy(T* object) {
    delete object;
    if (object != nullptr) --alive;
    return CUBLAS_STATUS_SUCCESS;
}

bool is_refused(std::uint32_t epilogue) {
    for (std::size_t number = 0; number < mipnerf::kEpilogues.size(); ++number)
        if (static_cast<std::uint32_t>(mipnerf::kEpilogues[number]) == epilogue)
            return (refused.load() >> number & 1) != 0;
    return true;
}

bool has_mask(std::uint32_t epilogue) {
    return (epilogue & 128) != 0;
}
bool has_vector(std::uint32_t epilogue) {
    return (epilogue & CUBLASLT_EPILOGUE_BIAS) != 0 || epilogue == CUBLASLT_EPILOGUE_BGRADB;
}

// What is asked for, or a false `fits`.
struct Product {
    bool fits = false;
    std::int64_t m = 0, n = 0, k = 0;
    std::uint64_t fingerprint = 0;  // of all that an algorithm is chosen by, but for the preference

    Product(cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
            cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
        const bool turns_a = description->transpose_a == CUBLAS_OP_T;
        const bool turns_b = description->transpose_b == CUBLAS_OP_T;
        m = d->rows;
        n = d->columns;
        k = turns_a ? a->rows : a->columns;
        for (const auto* layout : {a, b, c, d})
            if (layout->rows < 1 || layout->columns < 1 || layout->leading < layout->rows) return;
        const bool sizes = (turns_a ? a->columns : a->rows) == m && (turns_b ? b->columns : b->rows) == k &&
                           (turns_b ? b->rows : b->columns) == n && c->rows == m && c->columns == n;
        const bool types = a->type == b->type && a->type != CUDA_R_32F && c->type == d->type &&
                           (d->type == a->type || d->type == CUDA_R_32F);
        if (!sizes || !types || c->leading != d->leading) return;
        if (has_vector(description->epilogue) &&
            (description->bias == nullptr || description->bias_type != d->type))
            return;
        if (has_mask(description->epilogue) &&
            (description->mask == nullptr || !is_aligned(description->mask, 16) ||
             description->mask_leading % 128 != 0 || description->mask_leading < m))
            return;
        fits = true;
        for (const std::int64_t part :
             {m, n, k, a->leading, b->leading, d->leading, static_cast<std::int64_t>(a->type),
              static_cast<std::int64_t>(d->type), static_cast<std::int64_t>(turns_a),
              static_cast<std::int64_t>(turns_b), static_cast<std::int64_t>(description->epilogue),
              has_mask(description->epilogue) ? description->mask_leading : 0})
            fingerprint = fingerprint * 1000003 + std::hash<std::int64_t>{}(part);
    }
};

}  // namespace

extern "C" {

const char* cublasLtGetStatusString(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return "CUBLAS_STATUS_SUCCESS";
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                                 : "CUBLAS_STATUS_INVALID_VALUE";
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
    return create(description);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    return destroy(description);
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value,
                                              size_t bytes) {
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return take(description->transpose_a, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return take(description->transpose_b, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return take(description->epilogue, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            return take(description->bias, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return take(description->mask, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return take(description->mask_leading, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
            return take(description->bias_type, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, uint64_t rows,
                                          uint64_t columns, int64_t leading) {
    return create(layout, type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns), leading);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return destroy(layout);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return create(preference);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return destroy(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        return take(preference->workspace, value, bytes);
    return take(preference->alignments[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results, int* found) {
    const Product product(description, a, b, c, d);
    *found = 0;
    if (!product.fits || wanted < 1 || handle != reinterpret_cast<cublasLtHandle_t>(&handle_object))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (is_refused(description->epilogue)) return CUBLAS_STATUS_NOT_SUPPORTED;
    // Of the mask and the bias the pointers themselves say how they are aligned.
    std::uint64_t* data = results->algo.data;
    data[0] = product.fingerprint;
    data[1] = preference->workspace;
    for (int i = 0; i < 4; ++i) data[2 + i] = preference->alignments[i];
    data[6] = has_vector(description->epilogue) ? mipnerf::alignment_of(description->bias) : 1;
    data[7] = has_mask(description->epilogue) ? mipnerf::alignment_of(description->mask) : 1;
    results->workspaceSize = preference->workspace;
    results->state = CUBLAS_STATUS_SUCCESS;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
    const Product product(description, a_layout, b_layout, c_layout, d_layout);
    const std::uint64_t* data = algorithm->data;
    const std::uint32_t epilogue = description->epilogue;
    if (!product.fits || product.fingerprint != data[0] || workspace_bytes < data[1] ||
        !is_aligned(workspace, 16) || !is_aligned(a, data[2]) || !is_aligned(b, data[3]) ||
        !is_aligned(c, data[4]) || !is_aligned(d, data[5]) || !is_aligned(description->bias, data[6]) ||
        !is_aligned(description->mask, data[7]) ||
        handle != reinterpret_cast<cublasLtHandle_t>(&handle_object) ||
        stream != reinterpret_cast<cudaStream_t>(&stream_object))
        return CUBLAS_STATUS_INVALID_VALUE;
    std::memset(workspace, 0xff, data[1]);  // it is the algorithm's
    const bool turns_a = description->transpose_a == CUBLAS_OP_T;
    const bool turns_b = description->transpose_b == CUBLAS_OP_T;
    const float product_scale = *static_cast<const float*>(alpha), scale = *static_cast<const float*>(beta);
    auto* mask = static_cast<unsigned char*>(description->mask);
    const auto element_of_b = [&](std::int64_t l, std::int64_t j) {
        return load(b_layout->type, b, turns_b ? j + l * b_layout->leading : l + j * b_layout->leading);
    };
    std::vector<float> column(static_cast<std::size_t>(product.m));
    for (std::int64_t j = 0; j < product.n; ++j) {
        std::fill(column.begin(), column.end(), 0.0f);
        float of_b = 0;
        for (std::int64_t l = 0; l < product.k; ++l) {
            const float factor = element_of_b(l, j);
            of_b += factor;
            for (std::int64_t i = 0; i < product.m; ++i)
                column[static_cast<std::size_t>(i)] +=
                    factor *
                    load(a_layout->type, a, turns_a ? l + i * a_layout->leading : i + l * a_layout->leading);
        }
        if (epilogue == CUBLASLT_EPILOGUE_BGRADB) store(d_layout->type, description->bias, j, of_b);
        for (std::int64_t i = 0; i < product.m; ++i) {
            float value = product_scale * column[static_cast<std::size_t>(i)];
            if (scale != 0) value += scale * load(c_layout->type, c, i + j * c_layout->leading);
            if ((epilogue & CUBLASLT_EPILOGUE_BIAS) != 0) value += load(d_layout->type, description->bias, i);
            if (has_mask(epilogue)) {
                const std::int64_t bit = i + j * description->mask_leading;
                unsigned char& byte = mask[bit / 8];
                const auto place = static_cast<unsigned char>(1u << (bit % 8));
                if (epilogue == CUBLASLT_EPILOGUE_DRELU)
                    value = (byte & place) != 0 ? value : 0;
                else
                    byte = static_cast<unsigned char>(value > 0 ? byte | place : byte & ~place);
            }
            if ((epilogue & CUBLASLT_EPILOGUE_RELU) != 0) value = value > 0 ? value : 0;
            store(d_layout->type, d, i + j * d_layout->leading, value);
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
    *guard = nullptr;
    return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
    return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_current_cuda_blas_handle(void** handle) {
    *handle = &handle_object;
    return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = &stream_object;
    return AOTI_TORCH_SUCCESS;
}

// For the tests: descriptors that nobody destroyed, and epilogues to have no algorithm for.
__attribute__((visibility("default"))) int cublaslt_alive() {
    return alive;
}
__attribute__((visibility("default"))) void cublaslt_refuse(std::uint32_t epilogues) {
    refused = epilogues;
}
}
