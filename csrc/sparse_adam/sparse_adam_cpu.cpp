// The operator sparse_adam on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"
#include "../common/vector_tasks.h"
#include "sparse_adam_math.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPerTask = 16384;
constexpr int64_t kPerBlock = 16;  // one cache line: skipped as a whole where all its gradients are zero
constexpr int64_t kAhead = 8;      // blocks that are on their way while one is worked on

struct Update {
    AdamOptions options;
    int64_t count;
    float *values, *gradient, *moment1, *moment2;

    // `length` is a constant for all blocks but the last.
    MIPNERF_INLINE bool is_touched(int64_t first, int64_t length) const {
        const float* const g = gradient + first;
        uint32_t any = 0;
#pragma omp simd reduction(| : any)
        for (int64_t i = 0; i < length; ++i) any |= float_bits(g[i]) << 1;  // -0 is zero too
        return any != 0;
    }
    MIPNERF_INLINE void block(int64_t first, int64_t length) const {
        float* const p = values + first;
        float* const g = gradient + first;
        float* const m = moment1 + first;
        float* const v = moment2 + first;
        const AdamOptions local = options;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) {
            const AdamEntry<float> entry = adam_update(g[i], local, p[i], m[i], v[i]);
            p[i] = entry.value;
            m[i] = entry.moment1;
            v[i] = entry.moment2;
            g[i] = 0.0f;
        }
    }

    // The blocks that were touched are looked for some way ahead, and what belongs to them is asked for: they
    // lie scattered, so that the processor does not guess them.
    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t) const {
        const int64_t end = std::min(count, (task + 1) * kPerTask);
        const int64_t begin = task * kPerTask, last = begin + (end - begin) / kPerBlock * kPerBlock;
        int32_t touched[kPerTask / kPerBlock];
        int64_t found = 0, done = 0;
        for (int64_t first = begin; first < last; first += kPerBlock) {
            if (!is_touched(first, kPerBlock)) continue;
            for (const float* array : {values, moment1, moment2}) __builtin_prefetch(array + first, 1);
            touched[found++] = static_cast<int32_t>(first - begin);
            if (found - done > kAhead) block(begin + touched[done++], kPerBlock);
        }
        while (done < found) block(begin + touched[done++], kPerBlock);
        if (last < end && is_touched(last, end - last)) block(last, end - last);
    }
};

void sparse_adam_cpu(Tensor values, Tensor gradient, Tensor moment1, Tensor moment2, double learning_rate,
                     double beta1, double beta2, double eps, int64_t step) {
    const Checker check{"sparse_adam"};
    const auto array = [&](const char* name, const Tensor& tensor) {
        check.dtype(name, tensor, {ScalarType::Float});
        check.that(sizes_text(tensor.sizes()) == sizes_text(values.sizes()), name, sizes_text(values.sizes()),
                   sizes_text(tensor.sizes()));
        check.that(tensor.is_contiguous(), name, "contiguous", "a view with other strides");
        check.same_device(name, tensor, "values", values);
        return static_cast<float*>(tensor.mutable_data_ptr());
    };
    check.that(step >= 1, "step", "1 or more", step);
    const Update update{adam_options(learning_rate, beta1, beta2, eps, static_cast<double>(step)),
                        values.numel(),
                        array("values", values),
                        array("gradient", gradient),
                        array("moment1", moment1),
                        array("moment2", moment2)};
    for_tasks((update.count + kPerTask - 1) / kPerTask, update);
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("sparse_adam", TORCH_BOX(&mipnerf::sparse_adam_cpu));
}
