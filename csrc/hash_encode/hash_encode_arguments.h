// What the operators that read a hash grid take, checked once and alike.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "../common/checks.h"
#include "hash_encode_math.h"

namespace mipnerf {

inline Attenuation attenuation_coded(const Checker& check, int64_t code) {
    check.that(code >= 0 && code <= 2, "attenuation", "0 (none), 1 (gaussian) or 2 (erf)", code);
    return static_cast<Attenuation>(code);
}

inline HashGrid checked_hash_grid(const Checker& check, const torch::stable::Tensor& tables,
                                  const std::vector<int64_t>& resolutions, int64_t table_size) {
    const int64_t levels = static_cast<int64_t>(resolutions.size());
    check.that(levels >= 1 && levels <= kMaxLevels, "resolutions", "1 to 16 levels", levels);
    for (const int64_t n : resolutions) check.that(n >= 1 && n <= 65536, "resolutions", "1 to 65536", n);
    const bool is_power = table_size >= 8 && table_size <= (1 << 26) && (table_size & (table_size - 1)) == 0;
    check.that(is_power, "table_size", "a power of two from 8 to 2^26", table_size);
    const HashGrid grid = hash_grid(resolutions.data(), static_cast<int>(levels), table_size);
    check.dims("tables", tables, 2, "[entries, F]");
    check.that(tables.size(0) == grid.entries, "tables", std::to_string(grid.entries) + " entries",
               tables.size(0));
    const int64_t features = tables.size(1);
    check.that(features == 2 || features == 4, "tables", "2 or 4 features an entry", features);
    return grid;
}

}  // namespace mipnerf
