// Products of the network's small matrices on the CPU, many of them in one pass over the threads, where torch
// starts them for every product, every sum and every mask. Each is rows of sums, a number of one operand
// times a row of the other, which is packed for the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/vector_tasks.h"
#include "../common/vector_transpose.h"
#include "mlp_sums.h"

namespace mipnerf {

// A matrix as it lies in memory: by rows, each without gaps, or by columns.
struct Operand {
    const float* data;
    int64_t stride;  // between rows, or columns; 0: one for all
    bool by_columns;

    MIPNERF_INLINE const float* at(int64_t row, int64_t column) const {
        return by_columns ? data + column * stride + row : data + row * stride + column;
    }
    Operand transposed() const { return {data, stride, !by_columns}; }
    Operand from_column(int64_t column) const { return {at(0, column), stride, by_columns}; }
};

// sums[r, c] (+)= sum_t left[r, t] right[t, c], and zero where the mask [rows, columns] is not above zero.
struct Product {
    int64_t rows, terms;
    int columns;
    Operand left, right;
    float* sums;
    int64_t stride;
    bool add = false;
    const float* mask = nullptr;
    int64_t mask_stride = 0;
    int64_t rows_at_a_time = 128;   // of a task: packing the right operand for them is little beside
    const Product* then = nullptr;  // another of the same rows and columns, added to these sums
    // Each row has terms of its own, one row's behind the other's in `right`; the one row of `left` is for
    // all, and a task does one row at a time.
    bool terms_of_each_row = false;

    int64_t parts() const { return (rows + rows_at_a_time - 1) / rows_at_a_time; }
    MIPNERF_INLINE int64_t blocks(int columns_of_block) const {
        return (columns + columns_of_block - 1) / columns_of_block;
    }
};

// A matrix of equal rows.
MIPNERF_INLINE Operand same_row(const float* data) {
    return {data, 0, false};
}

// A row of ones: products with it are sums over the rows of the other.
inline constexpr float kOne = 1.0f;
inline constexpr Operand kRowOfOnes{&kOne, 0, true};
inline constexpr Operand kColumnOfOnes{&kOne, 0, false};

namespace products {

// Columns of a block.
template <int W>
constexpr int kColumns = 2 * W;
constexpr int kMostColumns = 32;

// Terms of a sum at a time: packed, two vectors of each are within the first-level cache.
constexpr int kTerms = 256;

// Terms that the left operand is fetched ahead.
constexpr int kAhead = 12;

// Of an operand so many terms (rows) and columns, 2 W a row with zeros beside.
template <int W>
MIPNERF_INLINE void pack(const Operand& from, int64_t term, int terms, int64_t first, int columns,
                         float* packed) {
    if (from.by_columns) {
        constexpr int N = kTransposed<W>;
        const int whole_terms = terms / N * N, whole_columns = columns / N * N;
        for (int c = 0; c < whole_columns; c += N)
            for (int t = 0; t < whole_terms; t += N)
                transpose<N>(from.at(term + t, first + c), from.stride, packed + t * kColumns<W> + c,
                             kColumns<W>);
        for (int c = 0; c < columns; ++c)
            for (int t = c < whole_columns ? whole_terms : 0; t < terms; ++t)
                packed[t * kColumns<W> + c] = *from.at(term + t, first + c);
        for (int c = columns; c < kColumns<W>; ++c)
            for (int t = 0; t < terms; ++t) packed[t * kColumns<W> + c] = 0.0f;
        return;
    }
    const float* row = from.at(term, first);
    if (columns == kColumns<W>) {
        for (int t = 0; t < terms; ++t, row += from.stride) {
            store_vector<W>(packed + t * kColumns<W>, load_vector<W>(row));
            store_vector<W>(packed + t * kColumns<W> + W, load_vector<W>(row + W));
        }
        return;
    }
    for (int t = 0; t < terms; ++t, row += from.stride)
        for (int c = 0; c < kColumns<W>; ++c) packed[t * kColumns<W> + c] = c < columns ? row[c] : 0.0f;
}

// sum[r, c] = sum_t left[r, t] packed[t, c] of R rows.
template <int W, int R>
MIPNERF_INLINE void sum_rows(const float* left, int64_t row_stride, int64_t term_stride, const float* packed,
                             int terms, float* sums) {
    Vector<W> sum[R][2];
    MIPNERF_UNROLL for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = splat<W>(0.0f);
    for (int t = 0; t < terms; ++t, left += term_stride) {
        const Vector<W> a = load_vector<W>(packed + t * kColumns<W>);
        const Vector<W> b = load_vector<W>(packed + t * kColumns<W> + W);
        // By columns this is a line of memory for every term, too far apart to be foreseen.
        __builtin_prefetch(left + kAhead * term_stride);
        __builtin_prefetch(left + kAhead * term_stride + (R - 1) * row_stride);
        MIPNERF_UNROLL for (int r = 0; r < R; ++r) {
            const Vector<W> number = splat<W>(left[r * row_stride]);
            sum[r][0] = fused<W>(number, a, sum[r][0]);
            sum[r][1] = fused<W>(number, b, sum[r][1]);
        }
    }
    MIPNERF_UNROLL for (int r = 0; r < R; ++r) {
        store_vector<W>(sums + r * kColumns<W>, sum[r][0]);
        store_vector<W>(sums + r * kColumns<W> + W, sum[r][1]);
    }
}

// The sums of some rows and columns of a block to where they go. Apart from the products, which are all that
// has to be unrolled: with few samples the code that is read for the first time counts.
template <int W>
MIPNERF_INLINE void add_rows(const float* sums, int rows, int columns, bool add, float* to, int64_t stride,
                             const float* mask, int64_t mask_stride) {
    if (columns < kColumns<W>) {
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < columns; ++c) {
                const float sum = sums[r * kColumns<W> + c] + (add ? to[r * stride + c] : 0.0f);
                to[r * stride + c] = mask != nullptr && mask[r * mask_stride + c] <= 0.0f ? 0.0f : sum;
            }
        return;
    }
    const Vector<W> zero = splat<W>(0.0f);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < kColumns<W>; c += W) {
            Vector<W> sum = load_vector<W>(sums + r * kColumns<W> + c);
            if (add) sum += load_vector<W>(to + r * stride + c);
            if (mask != nullptr) sum = load_vector<W>(mask + r * mask_stride + c) <= zero ? zero : sum;
            store_vector<W>(to + r * stride + c, sum);
        }
}

template <int W>
MIPNERF_INLINE void sum_block(const Product& product, int64_t first_row, int rows, int64_t block, bool add) {
    constexpr int R = kSumsAtATime<W>;
    alignas(64) float packed[kTerms * kMostColumns], sums[R * kColumns<W>];
    const int64_t first = block * kColumns<W>;
    const int columns = static_cast<int>(std::min<int64_t>(kColumns<W>, product.columns - first));
    const Operand& left = product.left;
    const int64_t row_stride = left.by_columns ? 1 : left.stride;
    const int64_t term_stride = left.by_columns ? left.stride : 1;
    // Once without terms too: the sums are zero then.
    for (int64_t term = 0; term == 0 || term < product.terms; term += kTerms) {
        const int terms = static_cast<int>(std::min<int64_t>(kTerms, product.terms - term));
        pack<W>(product.right, term, terms, first, columns, packed);
        const bool last = term + terms == product.terms;
        for (int done = 0; done < rows;) {
            const int64_t row = first_row + done;
            const float* const from = left.at(row, term);
            const int rest = rows - done;
            int count = 1;
            if (rest >= R) {
                sum_rows<W, R>(from, row_stride, term_stride, packed, terms, sums);
                count = R;
            } else if (rest >= 4) {
                sum_rows<W, 4>(from, row_stride, term_stride, packed, terms, sums);
                count = 4;
            } else {
                sum_rows<W, 1>(from, row_stride, term_stride, packed, terms, sums);
            }
            const float* const mask =
                product.mask != nullptr && last ? product.mask + row * product.mask_stride + first : nullptr;
            add_rows<W>(sums, count, columns, add, product.sums + row * product.stride + first,
                        product.stride, mask, product.mask_stride);
            done += count;
        }
        add = true;
    }
}

// Tasks are blocks of columns of some rows, one product after the other.
struct Blocks {
    const std::vector<Product>& products;

    int64_t tasks() const {
        int64_t total = 0;
        for (const Product& product : products) total += product.parts() * product.blocks(2 * vector_lanes());
        return total;
    }

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t) const {
        const Product* product = products.data();
        for (;; ++product) {
            const int64_t tasks = product->parts() * product->blocks(kColumns<W>);
            if (task < tasks) break;
            task -= tasks;
        }
        const int64_t parts = product->parts(), block = task / parts;
        const int64_t row = task % parts * product->rows_at_a_time;
        const int rows = static_cast<int>(std::min(product->rows_at_a_time, product->rows - row));
        if (product->terms_of_each_row) {
            Product one = *product;
            one.right.data = product->right.at(row * product->terms, 0);
            one.sums += row * product->stride;
            return sum_block<W>(one, 0, 1, block, product->add);
        }
        bool add = product->add;
        for (; product != nullptr; product = product->then, add = true)
            sum_block<W>(*product, row, rows, block, add);
    }
};

}  // namespace products

// All of them; none may read what another writes.
inline void for_products(const std::vector<Product>& products) {
    const products::Blocks body{products};
    for_tasks(body.tasks(), body);
}

}  // namespace mipnerf
