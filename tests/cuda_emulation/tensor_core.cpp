// The warp-wide products and the asynchronous copies behind tensor_core.h.
#include "tensor_core.h"

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "asynchronous.h"
#include "races.h"

namespace mipnerf::emulation {

namespace {

// Every product of the tests comes through here.
#define MIPNERF_FAST __attribute__((optimize("O3")))

const std::vector<float>& half_values() {
    static const std::vector<float> values = [] {
        std::vector<float> all(65536);
        for (unsigned bits = 0; bits < all.size(); ++bits)
            all[bits] = from_half_bits(static_cast<std::uint16_t>(bits));
        return all;
    }();
    return values;
}
const float* const half_value = half_values().data();

MIPNERF_FAST float wide(std::uint16_t bits, Bfloat16) {
    float x;
    const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
    memcpy(&x, &word, sizeof x);
    return x;
}
MIPNERF_FAST float wide(std::uint16_t bits, Half) {
    return half_value[bits];
}

template <typename T>
MIPNERF_FAST void perform_mma(void* const lanes[32]) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; ++i) {
        const MmaLane& lane = *static_cast<const MmaLane*>(lanes[i]);
        const int g = i / 4, q = i % 4;
        for (int r = 0; r < 4; ++r)
            for (int h = 0; h < 2; ++h)
                a[g + r % 2 * 8][2 * q + r / 2 * 8 + h] =
                    wide(static_cast<std::uint16_t>(lane.a[r] >> (16 * h)), T{});
        for (int r = 0; r < 2; ++r)
            for (int h = 0; h < 2; ++h)
                b[2 * q + 8 * r + h][g] = wide(static_cast<std::uint16_t>(lane.b[r] >> (16 * h)), T{});
    }
    double d[16][8];
    for (int row = 0; row < 16; ++row) {
        double sum[8];
        for (int i = 0; i < 8; ++i)
            sum[i] = static_cast<const MmaLane*>(lanes[row % 8 * 4 + i / 2])->d[row / 8 * 2 + i % 2];
        for (int k = 0; k < 16; ++k) {
            const double left = a[row][k];
            for (int i = 0; i < 8; ++i) sum[i] += left * b[k][i];
        }
        memcpy(d[row], sum, sizeof sum);
    }
    for (int i = 0; i < 32; ++i) {
        float* to = static_cast<const MmaLane*>(lanes[i])->d;
        const int g = i / 4, q = i % 4;
        for (int r = 0; r < 4; ++r) to[r] = static_cast<float>(d[g + r / 2 * 8][2 * q + r % 2]);
    }
}

}  // namespace

MIPNERF_FAST void perform_mma_bfloat16(void* const lanes[32]) {
    perform_mma<Bfloat16>(lanes);
}
MIPNERF_FAST void perform_mma_half(void* const lanes[32]) {
    perform_mma<Half>(lanes);
}

MIPNERF_FAST void perform_mma_tf32(void* const lanes[32]) {
    double a[16][8], b[8][8];
    for (int i = 0; i < 32; ++i) {
        const Tf32Lane& lane = *static_cast<const Tf32Lane*>(lanes[i]);
        const int g = i / 4, q = i % 4;
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][q + r / 2 * 4] = lane.a[r];
        for (int r = 0; r < 2; ++r) b[q + 4 * r][g] = lane.b[r];
    }
    for (int i = 0; i < 32; ++i) {
        float* d = static_cast<const Tf32Lane*>(lanes[i])->d;
        const int g = i / 4, q = i % 4;
        for (int r = 0; r < 4; ++r) {
            double sum = d[r];
            for (int k = 0; k < 8; ++k) sum += a[g + r / 2 * 8][k] * b[k][2 * q + r % 2];
            d[r] = static_cast<float>(sum);
        }
    }
}

MIPNERF_FAST void require_tf32(float operand) {
    std::uint32_t bits;
    memcpy(&bits, &operand, sizeof bits);
    if ((bits & 0x1fffu) != 0) fail("mma_m16n8k8_tf32: the operand %.9g was not rounded to TF32", operand);
}

MIPNERF_FAST void perform_ldmatrix(void* const lanes[32]) {
    for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 4; ++j) {
            const std::uint16_t* row = static_cast<const MatrixLane*>(lanes[8 * j + i / 4])->row.value;
            static_cast<const MatrixLane*>(lanes[i])->result[j] =
                row[i % 4 * 2] | static_cast<unsigned>(row[i % 4 * 2 + 1]) << 16;
        }
}
MIPNERF_FAST void perform_ldmatrix_transposed(void* const lanes[32]) {
    for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 4; ++j) {
            const auto* low = static_cast<const MatrixLane*>(lanes[8 * j + i % 4 * 2]);
            const auto* high = static_cast<const MatrixLane*>(lanes[8 * j + i % 4 * 2 + 1]);
            static_cast<const MatrixLane*>(lanes[i])->result[j] =
                low->row.value[i / 4] | static_cast<unsigned>(high->row.value[i / 4]) << 16;
        }
}

// ---- asynchronous copies

namespace {

struct Copy {
    void* to;
    const void* from;  // null: zeros
    std::size_t bytes;
    std::uint32_t place;
};
struct Copies {
    std::vector<Copy> open;                // not yet committed
    std::deque<std::vector<Copy>> groups;  // oldest first
};
std::vector<Copies> copies_of_threads;

Copies& copies() {
    const auto thread = static_cast<std::size_t>(current_thread());
    if (copies_of_threads.size() <= thread) copies_of_threads.resize(thread + 1);
    return copies_of_threads[thread];
}

void land(const Copy& copy) {
    races::finish_copy(copy.to, copy.bytes, copy.place);
    if (copy.from)
        memcpy(copy.to, copy.from, copy.bytes);
    else
        memset(copy.to, 0, copy.bytes);
}

}  // namespace

void issue_copy(void* shared, const void* global, std::size_t bytes, bool valid) {
    const auto place =
        static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)));
    if (valid) {
        races::begin_copy_from(global, bytes, place);
        if (is_outside_arrays(global, bytes))
            fail("AddressSanitizer: an asynchronous copy reads outside of its array\n  place: 0x%x", place);
    }
    if (is_outside_arrays(shared, bytes))
        fail("AddressSanitizer: an asynchronous copy writes outside of shared memory\n  place: 0x%x", place);
    races::begin_copy(shared, bytes, place);
    memset(shared, 0xff, bytes);
    copies().open.push_back({shared, valid ? global : nullptr, bytes, place});
}

void commit_copies() {
    Copies& mine = copies();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

void wait_for_copies(int groups_left) {
    Copies& mine = copies();
    std::vector<Copy> landing;
    while (static_cast<int>(mine.groups.size()) > groups_left) {
        landing.insert(landing.end(), mine.groups.front().begin(), mine.groups.front().end());
        mine.groups.pop_front();
    }
    for (std::size_t i = landing.size(); i > 1; --i)
        std::swap(landing[i - 1], landing[static_cast<std::size_t>(random_below(static_cast<int>(i)))]);
    for (const Copy& copy : landing) land(copy);
}

bool has_copies_in_flight() {
    if (copies_of_threads.size() <= static_cast<std::size_t>(current_thread())) return false;
    const Copies& mine = copies();
    bool any = !mine.open.empty();
    for (const std::vector<Copy>& group : mine.groups) any = any || !group.empty();
    return any;
}

void forget_copies() {
    if (copies_of_threads.size() <= static_cast<std::size_t>(current_thread())) return;
    copies().open.clear();
    copies().groups.clear();
}

}  // namespace mipnerf::emulation
