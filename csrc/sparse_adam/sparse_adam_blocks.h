// Adam on touched entries over arrays on the CPU, a cache line at a time. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/vector_tasks.h"
#include "sparse_adam_math.h"

namespace mipnerf {

struct AdamArrays {
    AdamOptions options;
    float *values, *gradient, *moment1, *moment2;

    static constexpr int64_t kPerBlock = 16;  // a line: skipped as a whole where all its gradients are zero
    static constexpr int64_t kAhead = 8;      // blocks that are on their way while one is worked on
    static constexpr int64_t kAtATime = 16384;

    // The numbers begin <= i < end. The blocks that were touched are looked for some way ahead, and what
    // belongs to them is asked for: they lie scattered, so that the processor does not guess them.
    MIPNERF_INLINE void update(int64_t begin, int64_t end) const {
        for (; begin < end; begin += kAtATime) update_some(begin, std::min(end, begin + kAtATime));
    }

  private:
    MIPNERF_INLINE void update_some(int64_t begin, int64_t end) const {
        const int64_t last = begin + (end - begin) / kPerBlock * kPerBlock;
        int32_t touched[kAtATime / kPerBlock];
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
};

}  // namespace mipnerf
