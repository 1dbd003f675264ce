// The asynchronous part of the emulation: barriers, bulk copies, warpgroup products, and the vector clocks
// that say what is ordered. See hopper_emulation.h for what it finds.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "common/hopper.cuh"

namespace mipnerf::emulation {

namespace {

constexpr unsigned kSharedWindow = 1024;  // what shared addresses start from
constexpr std::size_t kGranule = 16;      // bytes that the asynchronous operations move together
constexpr int kMostBarriers = 96;
constexpr int kWarpgroupThreads = 128;
constexpr unsigned kPoison = 0x7f95a5a5u;  // a signalling NaN: arithmetic changes it

using Clock = std::vector<std::uint32_t>;

// Most of the emulation's own time is spent here: vectorized, as a store under a condition would not be.
__attribute__((optimize("O3"))) void join(Clock& to, const Clock& from) {
    const std::size_t count = to.size();
    std::uint32_t* mine = to.data();
    const std::uint32_t* theirs = from.data();
    for (std::size_t i = 0; i < count; ++i) mine[i] = mine[i] < theirs[i] ? theirs[i] : mine[i];
}

// Components of a clock: threads, then warpgroups (how many products are complete), then barriers (phases).
struct Event {
    int component = -1;
    std::uint32_t clock = 0;
};

// `seen`: what comes before the thread's next step. `fenced`: of that, what the asynchronous operations see
// too.
struct View {
    Clock seen, fenced;
};

struct BarrierState {
    int block;
    std::size_t offset;
    unsigned arrivals;  // of each phase
    unsigned pending;
    std::int64_t bytes = 0;
    std::uint32_t phase = 0;
    int component;
    Event made;             // whoever uses the barrier comes after it
    View coming, complete;  // of this phase's arrivals, of the last completed phase
    struct Waiter {
        int thread;
        unsigned parity;
    };
    std::vector<Waiter> waiters;
    std::vector<Event> from_outside;  // arrivals and copies of other blocks, which this block must outlive
};

struct Copy {
    int block;
    unsigned char* to;
    const unsigned char* from;
    unsigned bytes;
    int barrier;
    std::uint32_t phase;
};

struct Granule {
    Event written;                      // by a copy
    bool is_written = false;            // by a copy, ever
    std::vector<Event> read;            // by products
    std::vector<Event> stored, loaded;  // by threads; the "races" build alone sees them
};

struct Call {
    const char* what = nullptr;  // null: not in a warpgroup operation
    Site site{};
    int number = 0;
    Product product;
};

struct PendingProduct {
    std::vector<Product> of_thread;       // 128
    std::vector<unsigned> operand;        // A in registers when it was issued
    std::uint32_t serial = 0, group = 0;  // group 0: not yet committed
    bool is_done = false;
    Site site{};
};

struct Accumulator {
    std::vector<float> values;  // [thread][n / 2]
    int under_way = 0;
    int n = 0;
    std::vector<float*> places;
};

struct Warpgroup {
    int first_thread = 0;
    int arrived = 0;
    bool is_fenced = false;
    std::uint32_t products = 0, groups = 0;
    std::deque<PendingProduct> pending;
    std::map<const float*, Accumulator> accumulators;  // by the place in the first thread
};

struct Asynchronous {
    bool is_active = false;
    int blocks = 0, block_threads = 0, threads = 0;
    std::vector<unsigned char*> shared;
    std::size_t shared_bytes = 0;
    std::vector<View> views;  // of threads
    std::vector<Call> calls;
    std::vector<Warpgroup> warpgroups;
    std::vector<BarrierState> barriers;
    std::vector<Copy> copies;
    std::vector<std::vector<Granule>> granules;
    std::vector<bool> ended;
    int at_cluster_barrier = 0;
    int multiprocessors = 4;
};
Asynchronous machine;

const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

bool differ(const char* text, const char* other) {
    return text != other && strcmp(text, other) != 0;
}

View& view() {
    return machine.views[static_cast<std::size_t>(current_thread())];
}
int block_of(int thread) {
    return thread / machine.block_threads;
}
int current_block() {
    return block_of(current_thread());
}
Warpgroup& warpgroup_of(int thread) {
    return machine.warpgroups[static_cast<std::size_t>(thread / kWarpgroupThreads)];
}

void require_active() {
    if (!machine.is_active) fail("this operation needs a launch by MIPNERF_LAUNCH_CLUSTERS");
}

// What the current thread did so far now comes before whoever learns of its clock.
void tick(int thread) {
    ++machine.views[static_cast<std::size_t>(thread)].seen[static_cast<std::size_t>(thread)];
}

std::uint32_t clock_of(int thread) {
    return machine.views[static_cast<std::size_t>(thread)].seen[static_cast<std::size_t>(thread)];
}

// What threads that met know together, for one of them. Joined: a copy is AddressSanitizer's, byte by byte.
void take_over(int thread, const View& all) {
    View& own = machine.views[static_cast<std::size_t>(thread)];
    join(own.seen, all.seen);
    join(own.fenced, all.fenced);
    tick(thread);
}

std::size_t offset_in(int block, const void* address, std::size_t bytes, const char* what, Site site) {
    const auto* p = static_cast<const unsigned char*>(address);
    const unsigned char* start = machine.shared[static_cast<std::size_t>(block)];
    if (p < start || p + bytes > start + machine.shared_bytes)
        fail("%s outside the block's shared memory, %s:%d", what, base_name(site.file), site.line);
    return static_cast<std::size_t>(p - start);
}

bool knows(const Clock& clock, const Event& event) {
    return event.component < 0 || clock[static_cast<std::size_t>(event.component)] >= event.clock;
}

std::string name_of(const Event& event) {
    char text[96];
    if (event.component < machine.threads)
        snprintf(text, sizeof text, "thread %d of block %d", event.component % machine.block_threads,
                 block_of(event.component));
    else if (event.component < machine.threads + static_cast<int>(machine.warpgroups.size()))
        snprintf(text, sizeof text, "a product of warpgroup %d", event.component - machine.threads);
    else
        snprintf(text, sizeof text, "a bulk copy");
    return text;
}

void add(std::vector<Event>& events, Event event) {
    for (Event& other : events)
        if (other.component == event.component) {
            other.clock = event.clock;
            return;
        }
    events.push_back(event);
}

// ---- barriers -----------------------------------------------------------------------------------

int find_barrier(int block, std::size_t offset, Site site) {
    for (std::size_t i = 0; i < machine.barriers.size(); ++i)
        if (machine.barriers[i].block == block && machine.barriers[i].offset == offset) {
            if (!knows(view().seen, machine.barriers[i].made))
                fail(
                    "the barrier at byte %zu is used with no barrier between its initialisation and this, "
                    "%s:%d",
                    offset, base_name(site.file), site.line);
            return static_cast<int>(i);
        }
    fail("there is no barrier at byte %zu of the shared memory of block %d, %s:%d", offset, block,
         base_name(site.file), site.line);
}

void complete_if_due(BarrierState& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    for (const Copy& copy : machine.copies)
        if (&machine.barriers[static_cast<std::size_t>(copy.barrier)] == &barrier &&
            copy.phase == barrier.phase)
            fail(
                "the barrier at byte %zu completes while a bulk copy that it counts is under way: fewer "
                "bytes were "
                "expected than copied",
                barrier.offset);
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    barrier.complete = barrier.coming;
    barrier.complete.seen[static_cast<std::size_t>(barrier.component)] = barrier.phase;
    barrier.complete.fenced[static_cast<std::size_t>(barrier.component)] = barrier.phase;
    std::vector<BarrierState::Waiter> still;
    for (const BarrierState::Waiter& waiter : barrier.waiters) {
        if ((barrier.phase & 1u) == waiter.parity)
            still.push_back(waiter);
        else
            wake(waiter.thread);
    }
    barrier.waiters.swap(still);
}

// ---- copies -------------------------------------------------------------------------------------

void land(std::size_t which) {
    const Copy copy = machine.copies[which];
    machine.copies.erase(machine.copies.begin() + static_cast<std::ptrdiff_t>(which));
    memcpy(copy.to, copy.from, copy.bytes);
    BarrierState& barrier = machine.barriers[static_cast<std::size_t>(copy.barrier)];
    barrier.bytes -= copy.bytes;
    complete_if_due(barrier);
}

// ---- products -----------------------------------------------------------------------------------

struct Operand {
    hopper::OperandLayout layout;
    bool is_mn_major;
    int rows;  // of A; columns of B

    std::size_t core_matrix(int octet, int k_octet) const {
        return layout.address - kSharedWindow + static_cast<std::size_t>(octet) * layout.stride +
               static_cast<std::size_t>(k_octet) * layout.leading;
    }
};

Operand decode(std::uint64_t descriptor, bool is_mn_major, int rows, Site site) {
    const Operand operand{hopper::decode_descriptor(descriptor), is_mn_major, rows};
    if (operand.layout.swizzle != 0 || (descriptor >> 49 & 7u) != 0)
        fail("the descriptor %016llx asks for a swizzle, %s:%d", static_cast<unsigned long long>(descriptor),
             base_name(site.file), site.line);
    for (const int octet : {0, rows / 8 - 1})
        for (const int k : {0, 1})
            if (operand.layout.address < kSharedWindow ||
                operand.core_matrix(octet, k) + 128 > machine.shared_bytes)
                fail("the descriptor %016llx leaves shared memory, %s:%d",
                     static_cast<unsigned long long>(descriptor), base_name(site.file), site.line);
    return operand;
}

float number(const unsigned char* from, bool is_half) {
    std::uint16_t bits;
    memcpy(&bits, from, 2);
    return is_half ? from_half_bits(bits) : from_bfloat16_bits(bits);
}

// [rows][16]
void gather(const Operand& operand, int block, bool is_half, float* to) {
    const unsigned char* shared = machine.shared[static_cast<std::size_t>(block)];
    for (int octet = 0; octet < operand.rows / 8; ++octet)
        for (int k_octet = 0; k_octet < 2; ++k_octet) {
            const unsigned char* matrix = shared + operand.core_matrix(octet, k_octet);
            for (int line = 0; line < 8; ++line)
                for (int i = 0; i < 8; ++i) {
                    const float x = number(matrix + 16 * line + 2 * i, is_half);
                    const int row = operand.is_mn_major ? i : line, k = operand.is_mn_major ? line : i;
                    to[(8 * octet + row) * 16 + 8 * k_octet + k] = x;
                }
        }
}

__attribute__((optimize("O3"))) void multiply(const float* a, const float* b_t, int n, float* d) {
    for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 16; ++k) {
            const float x = a[row * 16 + k];
            for (int column = 0; column < n; ++column) d[row * n + column] += x * b_t[k * n + column];
        }
}

void execute(int warpgroup, PendingProduct& pending) {
    Warpgroup& group = machine.warpgroups[static_cast<std::size_t>(warpgroup)];
    const Product& product = pending.of_thread[0];
    const int n = product.n, block = block_of(group.first_thread);
    static std::vector<float> a(64 * 16), b(256 * 16), b_t(256 * 16), d(64 * 256);
    if (product.a_in_registers) {
        for (int t = 0; t < kWarpgroupThreads; ++t)
            for (int i = 0; i < 4; ++i) {
                const unsigned word = pending.operand[static_cast<std::size_t>(4 * t + i)];
                const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i % 2), k = 2 * (t % 4) + 8 * (i / 2);
                for (int half = 0; half < 2; ++half) {
                    const auto bits = static_cast<std::uint16_t>(word >> (16 * half));
                    a[static_cast<std::size_t>(row * 16 + k + half)] =
                        product.is_half ? from_half_bits(bits) : from_bfloat16_bits(bits);
                }
            }
    } else {
        gather(decode(product.a, product.a_is_mn_major, 64, pending.site), block, product.is_half, a.data());
    }
    gather(decode(product.b, product.b_is_mn_major, n, pending.site), block, product.is_half, b.data());
    for (int column = 0; column < n; ++column)
        for (int k = 0; k < 16; ++k)
            b_t[static_cast<std::size_t>(k * n + column)] = b[static_cast<std::size_t>(column * 16 + k)];

    Accumulator& accumulator = group.accumulators.at(product.accumulator);
    const int each = n / 2;
    const auto place = [&](int t, int i) {
        const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2);
        const int column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
        return static_cast<std::size_t>(row * n + column);
    };
    for (int t = 0; t < kWarpgroupThreads; ++t)
        for (int i = 0; i < each; ++i)
            d[place(t, i)] =
                product.accumulate ? accumulator.values[static_cast<std::size_t>(t * each + i)] : 0.0f;
    multiply(a.data(), b_t.data(), n, d.data());
    for (int t = 0; t < kWarpgroupThreads; ++t)
        for (int i = 0; i < each; ++i)
            accumulator.values[static_cast<std::size_t>(t * each + i)] = d[place(t, i)];
    pending.is_done = true;
}

// The products that may be next: of each accumulator the oldest that is not done.
bool execute_one(int warpgroup) {
    Warpgroup& group = machine.warpgroups[static_cast<std::size_t>(warpgroup)];
    std::vector<const float*> passed;
    std::vector<PendingProduct*> next;
    for (PendingProduct& pending : group.pending) {
        if (pending.is_done) continue;
        const float* key = pending.of_thread[0].accumulator;
        bool is_first = true;
        for (const float* other : passed) is_first = is_first && other != key;
        if (is_first) next.push_back(&pending);
        passed.push_back(key);
    }
    if (next.empty()) return false;
    execute(warpgroup, *next[static_cast<std::size_t>(random_below(static_cast<int>(next.size())))]);
    return true;
}

void read_operand(int warpgroup, const Operand& operand, std::uint32_t serial, Site site) {
    const Warpgroup& group = machine.warpgroups[static_cast<std::size_t>(warpgroup)];
    const int block = block_of(group.first_thread);
    const View* views[4];
    for (int warp = 0; warp < 4; ++warp)
        views[warp] =
            &machine.views[static_cast<std::size_t>(group.first_thread + 32 * warp + random_below(32))];
    auto& granules = machine.granules[static_cast<std::size_t>(block)];
    for (int octet = 0; octet < operand.rows / 8; ++octet)
        for (int k = 0; k < 2; ++k) {
            const std::size_t start = operand.core_matrix(octet, k);
            for (std::size_t i = start / kGranule; i < (start + 128 + kGranule - 1) / kGranule; ++i) {
                Granule& granule = granules[i];
                for (const View* v : views) {
                    if (!knows(v->seen, granule.written))
                        fail(
                            "a product reads byte %zu of shared memory, to which a bulk copy may be under "
                            "way, %s:%d",
                            i * kGranule, base_name(site.file), site.line);
                    for (const Event& store : granule.stored) {
                        if (!knows(v->seen, store))
                            fail(
                                "race: a product reads byte %zu of shared memory, which %s writes with no "
                                "barrier "
                                "between, %s:%d",
                                i * kGranule, name_of(store).c_str(), base_name(site.file), site.line);
                        if (!knows(v->fenced, store))
                            fail(
                                "a product reads byte %zu of shared memory, which %s wrote without a "
                                "proxy_fence, "
                                "%s:%d",
                                i * kGranule, name_of(store).c_str(), base_name(site.file), site.line);
                    }
                }
                add(granule.read, {machine.threads + warpgroup, serial});
            }
        }
}

// ---- what a warpgroup does together -------------------------------------------------------------

bool same(const Product& x, const Product& y) {
    return x.n == y.n && x.is_half == y.is_half && x.a_in_registers == y.a_in_registers &&
           x.a_is_mn_major == y.a_is_mn_major && x.b_is_mn_major == y.b_is_mn_major &&
           x.accumulate == y.accumulate && x.a == y.a && x.b == y.b;
}

// Waits for the other threads of the warpgroup; true in the one that comes last, which acts for all.
template <typename Act>
void together(const char* what, int number, const Product* product, Site site, const Act& act) {
    require_active();
    const int thread = current_thread();
    Warpgroup& group = warpgroup_of(thread);
    Call& mine = machine.calls[static_cast<std::size_t>(thread)];
    mine.what = what;
    mine.site = site;
    mine.number = number;
    if (product) mine.product = *product;
    for (int t = group.first_thread; t < group.first_thread + kWarpgroupThreads; ++t) {
        const Call& other = machine.calls[static_cast<std::size_t>(t)];
        if (!other.what || t == thread) continue;
        if (differ(other.what, what) || other.number != number || other.site.line != site.line ||
            differ(other.site.file, site.file))
            fail("divergence: a thread of a warpgroup calls %s at %s:%d while another is in %s at %s:%d",
                 what, base_name(site.file), site.line, other.what, base_name(other.site.file),
                 other.site.line);
        if (product && !same(*product, other.product))
            fail("divergence: the threads of a warpgroup do not ask for the same product, %s:%d",
                 base_name(site.file), site.line);
        break;  // the others agree with that one
    }
    if (++group.arrived < kWarpgroupThreads) {
        park(what, site);
        return;
    }
    group.arrived = 0;
    act(group);
    for (int t = group.first_thread; t < group.first_thread + kWarpgroupThreads; ++t) {
        machine.calls[static_cast<std::size_t>(t)].what = nullptr;
        if (t != thread) wake(t);
    }
}

// Completes the groups up to `last` and gives back the accumulators that nothing is under way for.
void retire(int warpgroup, std::uint32_t last) {
    Warpgroup& group = machine.warpgroups[static_cast<std::size_t>(warpgroup)];
    const auto is_due = [&](const PendingProduct& p) { return p.group != 0 && p.group <= last; };
    for (bool any = true; any;) {
        any = false;
        for (const PendingProduct& pending : group.pending)
            if (is_due(pending) && !pending.is_done) any = true;
        if (any) execute_one(warpgroup);
    }
    std::uint32_t complete = 0;
    while (!group.pending.empty() && is_due(group.pending.front())) {
        const PendingProduct& pending = group.pending.front();
        const Product& product = pending.of_thread[0];
        complete = pending.serial;
        if (product.a_in_registers)
            for (int t = 0; t < kWarpgroupThreads; ++t)
                if (memcmp(pending.of_thread[static_cast<std::size_t>(t)].registers,
                           &pending.operand[static_cast<std::size_t>(4 * t)], 16) != 0)
                    fail("thread %d of a warpgroup wrote to operand A of a product under way, %s:%d", t,
                         base_name(pending.site.file), pending.site.line);
        Accumulator& accumulator = group.accumulators.at(product.accumulator);
        if (--accumulator.under_way == 0) {
            const int each = accumulator.n / 2;
            for (int t = 0; t < kWarpgroupThreads; ++t) {
                float* place = accumulator.places[static_cast<std::size_t>(t)];
                for (int i = 0; i < each; ++i) {
                    unsigned bits;
                    memcpy(&bits, place + i, 4);
                    if (bits != kPoison)
                        fail(
                            "thread %d of a warpgroup wrote to the accumulators of a product under way, "
                            "%s:%d",
                            t, base_name(pending.site.file), pending.site.line);
                }
                memcpy(place, &accumulator.values[static_cast<std::size_t>(t * each)],
                       sizeof(float) * static_cast<std::size_t>(each));
            }
            group.accumulators.erase(product.accumulator);
        }
        group.pending.pop_front();
    }
    if (complete == 0) return;
    for (int t = group.first_thread; t < group.first_thread + kWarpgroupThreads; ++t)
        machine.views[static_cast<std::size_t>(t)]
            .seen[static_cast<std::size_t>(machine.threads + warpgroup)] = complete;
}

}  // namespace

// ---- what kernels call --------------------------------------------------------------------------

void wgmma_product(const Product& product, Site site) {
    together("a product", product.n, &product, site, [&](Warpgroup& group) {
        const int warpgroup = group.first_thread / kWarpgroupThreads;
        const int each = product.n / 2;
        PendingProduct pending;
        pending.site = site;
        pending.serial = ++group.products;
        for (int t = 0; t < kWarpgroupThreads; ++t) {
            pending.of_thread.push_back(
                machine.calls[static_cast<std::size_t>(group.first_thread + t)].product);
            const unsigned* registers = pending.of_thread.back().registers;
            if (product.a_in_registers)
                pending.operand.insert(pending.operand.end(), registers, registers + 4);
        }
        const float* key = pending.of_thread[0].accumulator;
        const auto found = group.accumulators.find(key);
        if (!group.is_fenced && (found == group.accumulators.end() || product.a_in_registers))
            fail("a product whose registers were touched since the last wgmma_fence, %s:%d",
                 base_name(site.file), site.line);
        if (found == group.accumulators.end()) {
            Accumulator& accumulator = group.accumulators[key];
            accumulator.n = product.n;
            for (const Product& p : pending.of_thread) {
                accumulator.places.push_back(p.accumulator);
                accumulator.values.insert(accumulator.values.end(), p.accumulator, p.accumulator + each);
                for (int i = 0; i < each; ++i) memcpy(p.accumulator + i, &kPoison, 4);
            }
        } else if (found->second.n != product.n) {
            fail("products of different shapes with the same accumulators under way, %s:%d",
                 base_name(site.file), site.line);
        }
        ++group.accumulators[key].under_way;
        if (!product.a_in_registers)
            read_operand(warpgroup, decode(product.a, product.a_is_mn_major, 64, site), pending.serial, site);
        read_operand(warpgroup, decode(product.b, product.b_is_mn_major, product.n, site), pending.serial,
                     site);
        group.pending.push_back(std::move(pending));
    });
}

void wgmma_fence(Site site) {
    together("wgmma_fence", 0, nullptr, site, [](Warpgroup& group) { group.is_fenced = true; });
}

void wgmma_commit(Site site) {
    together("wgmma_commit", 0, nullptr, site, [](Warpgroup& group) {
        ++group.groups;
        for (PendingProduct& pending : group.pending)
            if (pending.group == 0) pending.group = group.groups;
    });
}

void wgmma_wait(int groups, Site site) {
    together("wgmma_wait", groups, nullptr, site, [&](Warpgroup& group) {
        const std::uint32_t keep = static_cast<std::uint32_t>(groups);
        if (group.groups > keep) retire(group.first_thread / kWarpgroupThreads, group.groups - keep);
        if (group.accumulators.empty()) group.is_fenced = false;
    });
}

void warpgroup_registers(int registers, Site site) {
    if (registers % 8 != 0 || registers < 24 || registers > 256)
        fail("setmaxnreg takes multiples of 8 from 24 to 256, not %d, %s:%d", registers, base_name(site.file),
             site.line);
    together("setmaxnreg", registers, nullptr, site, [](Warpgroup&) {});
}

void barrier_init(void* barrier, unsigned arrivals) {
    require_active();
    const int block = current_block();
    const Site site = Site::here();
    BarrierState state;
    state.block = block;
    state.offset = offset_in(block, barrier, 8, "a barrier", site);
    if (state.offset % 8 != 0) fail("a barrier at byte %zu, which is not a multiple of 8", state.offset);
    for (const BarrierState& other : machine.barriers)
        if (other.block == block && other.offset == state.offset)
            fail("the barrier at byte %zu is initialised twice", state.offset);
    if (machine.barriers.size() == kMostBarriers) fail("more than %d barriers", kMostBarriers);
    state.arrivals = state.pending = arrivals;
    state.component = machine.threads + static_cast<int>(machine.warpgroups.size() + machine.barriers.size());
    state.coming.seen.resize(view().seen.size());
    state.coming.fenced = state.complete.seen = state.complete.fenced = state.coming.seen;
    state.made = {current_thread(), clock_of(current_thread())};
    tick(current_thread());
    machine.barriers.push_back(state);
    memset(barrier, 0, 8);
    machine.granules[static_cast<std::size_t>(block)][state.offset / kGranule].stored.clear();
}

void barrier_arrive(void* barrier, int block, unsigned expected_bytes, Site site) {
    require_active();
    const std::size_t offset = offset_in(current_block(), barrier, 8, "a barrier", site);
    const int target = block < 0 ? current_block() : block;
    if (target >= machine.blocks)
        fail("block %d of a cluster of %d, %s:%d", target, machine.blocks, base_name(site.file), site.line);
    if (machine.ended[static_cast<std::size_t>(target)])
        fail("an arrival at a barrier of block %d of the cluster, which has ended, %s:%d", target,
             base_name(site.file), site.line);
    BarrierState& state = machine.barriers[static_cast<std::size_t>(find_barrier(target, offset, site))];
    if (state.pending == 0)
        fail("more arrivals than the %u of the barrier at byte %zu, %s:%d", state.arrivals, offset,
             base_name(site.file), site.line);
    join(state.coming.seen, view().seen);
    join(state.coming.fenced, view().fenced);
    if (target != current_block()) add(state.from_outside, {current_thread(), clock_of(current_thread())});
    tick(current_thread());
    state.bytes += expected_bytes;
    --state.pending;
    complete_if_due(state);
}

void barrier_wait(void* barrier, unsigned parity, Site site) {
    require_active();
    const int block = current_block();
    const int which = find_barrier(block, offset_in(block, barrier, 8, "a barrier", site), site);
    if (parity > 1)
        fail("a barrier's parity is 0 or 1, not %u, %s:%d", parity, base_name(site.file), site.line);
    BarrierState& state = machine.barriers[static_cast<std::size_t>(which)];
    if ((state.phase & 1u) == parity) {
        state.waiters.push_back({current_thread(), parity});
        park("barrier_wait", site);
    }
    const BarrierState& passed = machine.barriers[static_cast<std::size_t>(which)];
    join(view().seen, passed.complete.seen);
    join(view().fenced, passed.complete.fenced);
}

void copy_bulk(void* to, const void* from, unsigned bytes, void* barrier, unsigned blocks, Site site) {
    require_active();
    const int block = current_block();
    const std::size_t offset = offset_in(block, to, bytes, "a bulk copy", site);
    const std::size_t barrier_offset = offset_in(block, barrier, 8, "a barrier", site);
    if (bytes == 0 || bytes % 16 != 0 || offset % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
        fail(
            "a bulk copy of %u bytes to byte %zu of shared memory: sizes and places are multiples of 16, "
            "%s:%d",
            bytes, offset, base_name(site.file), site.line);
    if (is_outside_arrays(from, bytes))
        fail("AddressSanitizer: a bulk copy reads outside of its array, %s:%d", base_name(site.file),
             site.line);
    if (blocks >> machine.blocks != 0)
        fail("a multicast to blocks %x of a cluster of %d, %s:%d", blocks, machine.blocks,
             base_name(site.file), site.line);
    for (int target = 0; target < machine.blocks; ++target) {
        if (blocks == 0 ? target != block : !(blocks >> target & 1u)) continue;
        if (machine.ended[static_cast<std::size_t>(target)])
            fail("a bulk copy to block %d of the cluster, which has ended, %s:%d", target,
                 base_name(site.file), site.line);
        const int which = find_barrier(target, barrier_offset, site);
        BarrierState& state = machine.barriers[static_cast<std::size_t>(which)];
        if (target != block) add(state.from_outside, {state.component, state.phase + 1});
        auto& granules = machine.granules[static_cast<std::size_t>(target)];
        for (std::size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
            Granule& granule = granules[i];
            const auto require = [&](const Event& event, const char* does) {
                if (!knows(view().seen, event))
                    fail(
                        "race: a bulk copy replaces byte %zu of the shared memory of block %d, which %s %s "
                        "with no "
                        "barrier between, %s:%d",
                        i * kGranule, target, name_of(event).c_str(), does, base_name(site.file), site.line);
            };
            require(granule.written, "writes");
            for (const Event& event : granule.read) require(event, "reads");
            for (const Event& event : granule.stored) require(event, "writes");
            for (const Event& event : granule.loaded) require(event, "reads");
            granule.read.clear();
            granule.stored.clear();
            granule.loaded.clear();
            granule.written = {state.component, state.phase + 1};
            granule.is_written = true;
        }
        unsigned char* place = machine.shared[static_cast<std::size_t>(target)] + offset;
        memset(place, 0xff, bytes);
        machine.copies.push_back(
            {target, place, static_cast<const unsigned char*>(from), bytes, which, state.phase});
    }
}

void cluster_sync(Site site) {
    require_active();
    if (++machine.at_cluster_barrier < machine.threads) {
        park("cluster_sync", site);
        return;
    }
    machine.at_cluster_barrier = 0;
    asynchronous::block_barrier(0, machine.threads);
    for (int t = 0; t < machine.threads; ++t)
        if (t != current_thread()) wake(t);
}

int cluster_rank() {
    require_active();
    return current_block();
}

void proxy_fence() {
    require_active();
    join(view().fenced, view().seen);
}

unsigned shared_address(const void* pointer) {
    return kSharedWindow +
           static_cast<unsigned>(offset_in(current_block(), pointer, 1, "an operand", Site::here()));
}

int multiprocessors() {
    return machine.multiprocessors;
}
void set_multiprocessors(int count) {
    machine.multiprocessors = count;
}

// ---- what the scheduler and the race detector call ----------------------------------------------

namespace asynchronous {

bool active() {
    return machine.is_active;
}
void begin_launch(bool is_active) {
    machine.is_active = is_active;
}

void begin_blocks(int blocks, int block_threads, const std::vector<unsigned char*>& shared,
                  std::size_t shared_bytes) {
    machine.blocks = blocks;
    machine.block_threads = block_threads;
    machine.threads = blocks * block_threads;
    machine.shared = shared;
    machine.shared_bytes = shared_bytes;
    const int warpgroups = (machine.threads + kWarpgroupThreads - 1) / kWarpgroupThreads;
    machine.warpgroups.assign(static_cast<std::size_t>(warpgroups), Warpgroup{});
    for (int w = 0; w < warpgroups; ++w)
        machine.warpgroups[static_cast<std::size_t>(w)].first_thread = w * kWarpgroupThreads;
    machine.barriers.clear();
    machine.copies.clear();
    const auto components = static_cast<std::size_t>(machine.threads + warpgroups + kMostBarriers);
    View nothing;
    nothing.seen.assign(components, 0);
    nothing.fenced.assign(components, 0);
    machine.views.assign(static_cast<std::size_t>(machine.threads), nothing);
    for (int t = 0; t < machine.threads; ++t) tick(t);
    machine.calls.assign(static_cast<std::size_t>(machine.threads), Call{});
    machine.granules.assign(static_cast<std::size_t>(blocks),
                            std::vector<Granule>(shared_bytes / kGranule + 1));
    machine.ended.assign(static_cast<std::size_t>(blocks), false);
    machine.at_cluster_barrier = 0;
}

void end_block(int block) {
    if (!machine.is_active) return;
    machine.ended[static_cast<std::size_t>(block)] = true;
    for (const Copy& copy : machine.copies)
        if (copy.block == block)
            fail("block %d of the cluster ends while a bulk copy to it is under way", block);
    View all = machine.views[static_cast<std::size_t>(block * machine.block_threads)];
    for (int t = block * machine.block_threads; t < (block + 1) * machine.block_threads; ++t)
        join(all.seen, machine.views[static_cast<std::size_t>(t)].seen);
    for (const BarrierState& barrier : machine.barriers) {
        if (barrier.block != block) continue;
        if (barrier.bytes != 0)
            fail("block %d of the cluster ends with %lld bytes outstanding at the barrier at byte %zu", block,
                 static_cast<long long>(barrier.bytes), barrier.offset);
        for (const Event& event : barrier.from_outside)
            if (!knows(all.seen, event))
                fail(
                    "block %d of the cluster may end before another block's arrival at, or copy counted by, "
                    "its "
                    "barrier at byte %zu",
                    block, barrier.offset);
    }
    for (const Warpgroup& group : machine.warpgroups)
        if (block_of(group.first_thread) == block && !group.pending.empty())
            fail("block %d of the cluster ends while a product is under way, %s:%d", block,
                 base_name(group.pending.front().site.file), group.pending.front().site.line);
}

bool step(bool must) {
    if (!machine.is_active) return false;
    // Seldom where there is other work, so that everything gets its chance to be too late.
    if (!must && random_below(64) != 0) return false;
    if (!machine.copies.empty() && (must || random_below(2) == 0)) {
        land(static_cast<std::size_t>(random_below(static_cast<int>(machine.copies.size()))));
        return true;
    }
    if (must) return false;  // no thread waits for a product but in wgmma_wait, which completes it
    return execute_one(random_below(static_cast<int>(machine.warpgroups.size())));
}

void block_barrier(int begin, int end) {
    if (!machine.is_active) return;
    View all = machine.views[static_cast<std::size_t>(begin)];
    for (int t = begin + 1; t < end; ++t) {
        join(all.seen, machine.views[static_cast<std::size_t>(t)].seen);
        join(all.fenced, machine.views[static_cast<std::size_t>(t)].fenced);
    }
    for (int t = begin; t < end; ++t) take_over(t, all);
}

void warp_barrier(int warp, unsigned lanes) {
    if (!machine.is_active) return;
    View all = machine.views[static_cast<std::size_t>(32 * warp + __builtin_ctz(lanes))];
    for (int lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1u) {
            join(all.seen, machine.views[static_cast<std::size_t>(32 * warp + lane)].seen);
            join(all.fenced, machine.views[static_cast<std::size_t>(32 * warp + lane)].fenced);
        }
    for (int lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1u) take_over(32 * warp + lane, all);
}

std::string describe() {
    if (!machine.is_active) return "";
    std::string text;
    for (const BarrierState& barrier : machine.barriers) {
        if (barrier.waiters.empty()) continue;
        char line[160];
        snprintf(line, sizeof line,
                 "\n  barrier at byte %zu of block %d: phase %u, %u of %u arrivals and %lld bytes missing",
                 barrier.offset, barrier.block, barrier.phase, barrier.pending, barrier.arrivals,
                 static_cast<long long>(barrier.bytes));
        text += line;
    }
    return text;
}

bool is_ordered(int earlier, std::uint32_t clock) {
    return knows(view().seen, {earlier, clock});
}
std::uint32_t clock_of_current() {
    return clock_of(current_thread());
}

bool is_shared(const void* address) {
    const auto* p = static_cast<const unsigned char*>(address);
    for (const unsigned char* start : machine.shared)
        if (p >= start && p < start + machine.shared_bytes) return true;
    return false;
}

bool note_access(const void* address, std::size_t bytes, Access access) {
    const auto* p = static_cast<const unsigned char*>(address);
    bool is_written = true;
    for (int block = 0; block < machine.blocks; ++block) {
        const unsigned char* start = machine.shared[static_cast<std::size_t>(block)];
        if (p < start || p >= start + machine.shared_bytes) continue;
        if (block != current_block()) fail("an ordinary access to the shared memory of another block");
        const auto offset = static_cast<std::size_t>(p - start);
        for (std::size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
            Granule& granule = machine.granules[static_cast<std::size_t>(block)][i];
            const auto require = [&](const Event& event, const char* does) {
                if (!knows(view().seen, event))
                    fail("race: a thread %s byte %zu of shared memory, which %s %s with no barrier between",
                         access == Access::write ? "writes" : "reads", offset, name_of(event).c_str(), does);
            };
            require(granule.written, "writes");
            if (access == Access::write)
                for (const Event& event : granule.read) require(event, "reads");
            add(access == Access::write ? granule.stored : granule.loaded,
                {current_thread(), clock_of_current()});
            is_written = is_written && granule.is_written;
        }
    }
    return is_written;
}

}  // namespace asynchronous
}  // namespace mipnerf::emulation
