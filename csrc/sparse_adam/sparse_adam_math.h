// Adam (Kingma and Ba 2015) for one number, skipped where its gradient is exactly zero: host and device. No
// torch, no CUDA header.
//
// An entry of the hash table that no sample of a step touched keeps its value and its moments, as if the step
// had not been; the bias corrections count all steps.
#pragma once

#include "../common/portable_math.h"

namespace mipnerf {

struct AdamOptions {
    float step_size;            // learning rate / (1 - beta1^step)
    float inverse_correction2;  // 1 / (1 - beta2^step)
    float beta1, beta2, eps;
};

inline AdamOptions adam_options(double learning_rate, double beta1, double beta2, double eps, double step) {
    return {static_cast<float>(learning_rate / (1 - pow(beta1, step))),
            static_cast<float>(1 / (1 - pow(beta2, step))), static_cast<float>(beta1),
            static_cast<float>(beta2), static_cast<float>(eps)};
}

// The same for a step known only on the device: beta^step = exp(-step decay), decay = -log(beta).
struct AdamDecays {
    float decay1, decay2;
};
inline AdamDecays adam_decays(double beta1, double beta2) {
    return {static_cast<float>(-log(beta1)), static_cast<float>(-log(beta2))};
}
MIPNERF_HOST_DEVICE AdamOptions adam_options_at(float learning_rate, float beta1, float beta2, float eps,
                                                const AdamDecays& decays, float step) {
    return {learning_rate / one_minus_exp_negative(step * decays.decay1),
            1.0f / one_minus_exp_negative(step * decays.decay2), beta1, beta2, eps};
}

template <typename T>
struct AdamEntry {
    T value, moment1, moment2;
};

template <typename T>
MIPNERF_HOST_DEVICE AdamEntry<T> adam_update(T gradient, const AdamOptions& options, T value, T moment1,
                                             T moment2) {
    const T beta1 = static_cast<T>(options.beta1), beta2 = static_cast<T>(options.beta2);
    const T m = beta1 * moment1 + (T(1) - beta1) * gradient;
    const T v = beta2 * moment2 + (T(1) - beta2) * gradient * gradient;
    const T root = square_root(v * static_cast<T>(options.inverse_correction2));
    const T updated = value - static_cast<T>(options.step_size) * m / (root + static_cast<T>(options.eps));
    // Selected, not branched over, so that loops vectorise.
    const bool is_touched = gradient != T(0);
    return {is_touched ? updated : value, is_touched ? m : moment1, is_touched ? v : moment2};
}

}  // namespace mipnerf
