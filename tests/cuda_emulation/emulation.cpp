// Fibers, the scheduler of one block, barriers, warp-level operations and guarded arrays of the emulation.
//
// MIPNERF_EMULATION_OMIT=file:line in the environment leaves out the barriers of that place; with
// MIPNERF_EMULATION_PLAIN_ATOMICS=1 atomic additions are plain ones.
//
// Compiled twice, without a sanitizer: with MIPNERF_EMULATION_ADDRESSES for the "memory" build, whose
// programs are compiled and linked with AddressSanitizer, and with MIPNERF_EMULATION_RACES for the "races"
// build, whose programs are compiled with -fsanitize=thread but linked against races.cpp instead of its
// runtime.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "asynchronous.h"
#include "common/device.cuh"
#include "races.h"
#include "tensor_core.h"

#if defined(MIPNERF_EMULATION_ADDRESSES)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif !defined(MIPNERF_EMULATION_RACES)
#error "the emulation is compiled with MIPNERF_EMULATION_ADDRESSES or with MIPNERF_EMULATION_RACES"
#endif
#if !defined(__x86_64__) && !defined(MIPNERF_EMULATION_UCONTEXT)
#define MIPNERF_EMULATION_UCONTEXT
#endif
#if defined(MIPNERF_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace mipnerf::emulation {

Indices indices;

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kMostSharedBytes = 227 * 1024;

// -------------------------------------------------------------------------------------------------------------
// fibers

struct Fiber {
#if !defined(MIPNERF_EMULATION_UCONTEXT)
    void* stack_pointer = nullptr;
#else
    ucontext_t context{};
#endif
    const void* stack_bottom = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber is not running
};

}  // namespace

#if !defined(MIPNERF_EMULATION_UCONTEXT)
// For x86-64; other processors use ucontext. swapcontext makes a system call for the signal mask at each
// switch; saving the callee-saved registers is all it takes.
extern "C" void mipnerf_emulation_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.type mipnerf_emulation_switch, @function
mipnerf_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mipnerf_emulation_switch, .-mipnerf_emulation_switch
)");
#endif

namespace {

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(MIPNERF_EMULATION_ADDRESSES)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if !defined(MIPNERF_EMULATION_UCONTEXT)
    mipnerf_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(MIPNERF_EMULATION_ADDRESSES)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void prepare_fiber(Fiber& fiber, void (*entry)()) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0)
        fail("no memory for the stacks of the threads");
    auto* bottom = static_cast<unsigned char*>(memory) + page;
    fiber.stack_bottom = bottom;
    fiber.stack_bytes = kStackBytes;
#if !defined(MIPNERF_EMULATION_UCONTEXT)
    // As after a call of `entry`: six saved registers, the address to return to, and a return address of 0
    // above it.
    auto* top = reinterpret_cast<void**>(bottom + kStackBytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    fiber.stack_pointer = top - 8;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = bottom;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

// ------------------------------------------------------------------------------------------------------ one
// block's state

enum class State : std::uint8_t { ready, at_block_barrier, at_warp_operation, at_collective, parked, gone };

struct Thread {
    Fiber fiber;
    dim3 index, block;
    State state = State::gone;
    WarpOperation operation = WarpOperation::sync;
    unsigned mask = 0;
    Site site{};
    const char* parked_in = "";
    Exchange exchange{};
    const char* collective = nullptr;  // the name of the whole warp's operation that it waits in
    void* handed_over = nullptr;
};

// A block of the cluster that is alive.
struct Block {
    int live = 0;     // threads that are not gone
    int waiting = 0;  // at the block barrier
    unsigned char* shared = nullptr;
};

struct Random {
    std::uint64_t state = 1;
    // splitmix64
    std::uint64_t next() {
        std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>((next() >> 32) * static_cast<std::uint64_t>(n) >> 32); }
};

// How the next thread is chosen; drawn for each block. Running one warp or one end of the block far ahead of
// the rest exposes a missing barrier that an even mixture may hide.
enum class Policy { any, one_warp_ahead, lowest_first, highest_first, count };

struct Machine {
    std::vector<std::unique_ptr<Thread>> threads;
    Fiber host;
    int count = 0;          // threads of all blocks that are alive together
    int block_threads = 0;  // of each of them: the threads of a cluster are numbered block after block
    int live = 0;           // not gone
    int current = -1;
    unsigned ready[32] = {};  // a bit for each lane of each warp
    int arrived[32] = {};     // lanes of each warp at the whole warp's operation
    std::vector<Block> blocks;
    Policy policy = Policy::any;
    Random random;
    const char* kernel = nullptr;
    void (*body)(const void*) = nullptr;
    const void* context = nullptr;
};
Machine machine;

int warps() {
    return (machine.count + 31) / 32;
}
Thread& thread(int rank) {
    return *machine.threads[static_cast<std::size_t>(rank)];
}
Block& block_of(int rank) {
    return machine.blocks[static_cast<std::size_t>(rank / machine.block_threads)];
}
const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

const char* name_of(WarpOperation operation) {
    static const char* const names[] = {"warp_sync",         "warp_shuffle",     "warp_shuffle_up",
                                        "warp_shuffle_down", "warp_shuffle_xor", "warp_ballot",
                                        "warp_any",          "warp_all"};
    return names[static_cast<int>(operation)];
}

std::string describe(const Thread& t) {
    char text[256];
    if (t.state == State::at_block_barrier)
        snprintf(text, sizeof text, "at block_sync, %s:%d", base_name(t.site.file), t.site.line);
    else if (t.state == State::at_collective)
        snprintf(text, sizeof text, "in %s, %s:%d", t.collective, base_name(t.site.file), t.site.line);
    else if (t.state == State::at_warp_operation)
        snprintf(text, sizeof text, "in %s with mask %08x, %s:%d", name_of(t.operation), t.mask,
                 base_name(t.site.file), t.site.line);
    else if (t.state == State::parked)
        snprintf(text, sizeof text, "in %s, %s:%d", t.parked_in, base_name(t.site.file), t.site.line);
    else
        snprintf(text, sizeof text, "%s", t.state == State::gone ? "gone" : "running");
    return text;
}

void make_ready(int rank) {
    thread(rank).state = State::ready;
    machine.ready[rank / 32] |= 1u << (rank % 32);
}

int random_bit(unsigned bits) {
    for (int skip = machine.random.below(__builtin_popcount(bits)); skip > 0; --skip) bits &= bits - 1;
    return __builtin_ctz(bits);
}

// The thread to run next, or -1 when none can.
int choose() {
    int candidates[32], n = 0;
    for (int w = 0; w < warps(); ++w)
        if (machine.ready[w]) candidates[n++] = w;
    if (n == 0) return -1;
    switch (machine.policy) {
        case Policy::lowest_first:
            return candidates[0] * 32 + __builtin_ctz(machine.ready[candidates[0]]);
        case Policy::highest_first:
            return candidates[n - 1] * 32 + 31 - __builtin_clz(machine.ready[candidates[n - 1]]);
        case Policy::one_warp_ahead: {
            const int w = machine.current / 32;
            if (machine.current >= 0 && machine.ready[w]) return w * 32 + random_bit(machine.ready[w]);
            break;
        }
        default:
            break;
    }
    const int w = candidates[machine.random.below(n)];
    return w * 32 + random_bit(machine.ready[w]);
}

[[noreturn]] void report_deadlock() {
    std::string text;
    for (int w = 0; w < warps(); ++w) {
        std::vector<std::pair<std::string, unsigned>> groups;
        for (int rank = w * 32; rank < machine.count && rank < w * 32 + 32; ++rank) {
            const std::string what = describe(thread(rank));
            std::size_t g = 0;
            while (g < groups.size() && groups[g].first != what) ++g;
            if (g == groups.size()) groups.emplace_back(what, 0u);
            groups[g].second |= 1u << (rank % 32);
        }
        for (const auto& [what, lanes] : groups) {
            char line[64];
            snprintf(line, sizeof line, "\n  warp %d, lanes %08x: ", w, lanes);
            text += line + what;
        }
    }
    fail("divergence: no thread of the block can go on%s%s", text.c_str(), asynchronous::describe().c_str());
}

void enter(int rank) {
    machine.current = rank;
    indices.thread = thread(rank).index;
    indices.block = thread(rank).block;
}

// Gives the processor to another thread of the block (or to the same one), or to the host when all are gone.
void run_next() {
    const int from = machine.current;
    Fiber& left = thread(from).fiber;
    if (machine.live == 0) {
        switch_fiber(left, machine.host);
    } else {
        asynchronous::step(false);
        int to = choose();
        while (to < 0 && asynchronous::step(true)) to = choose();
        if (to < 0) report_deadlock();
        machine.ready[to / 32] &= ~(1u << (to % 32));
        if (to == from) return;
        enter(to);
        switch_fiber(left, thread(to).fiber);
    }
}

void release_block_barrier_if_complete(int of) {
    Block& block = block_of(of);
    if (block.waiting == 0 || block.waiting < block.live) return;
    const Thread* first = nullptr;
    const int begin = of / machine.block_threads * machine.block_threads, end = begin + machine.block_threads;
    for (int rank = begin; rank < end; ++rank) {
        const Thread& t = thread(rank);
        if (t.state != State::at_block_barrier) continue;
        if (!first) first = &t;
        if (t.site.line != first->site.line || strcmp(t.site.file, first->site.file) != 0)
            fail("divergence: threads of one block meet at different barriers, %s:%d and %s:%d",
                 base_name(first->site.file), first->site.line, base_name(t.site.file), t.site.line);
    }
    races::block_barrier();
    asynchronous::block_barrier(begin, end);
    block.waiting = 0;
    for (int rank = begin; rank < end; ++rank)
        if (thread(rank).state == State::at_block_barrier) make_ready(rank);
}

// Lanes of `warp` in `mask` that are not gone.
unsigned live_lanes(int warp, unsigned mask) {
    unsigned lanes = 0;
    for (int lane = 0; lane < 32 && warp * 32 + lane < machine.count; ++lane)
        if ((mask >> lane & 1u) && thread(warp * 32 + lane).state != State::gone) lanes |= 1u << lane;
    return lanes;
}

void perform(int warp, unsigned lanes, WarpOperation operation) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
        if ((lanes >> lane & 1u) && thread(warp * 32 + lane).exchange.give[0]) votes |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane) {
        if (!(lanes >> lane & 1u)) continue;
        Thread& t = thread(warp * 32 + lane);
        unsigned vote = 0;
        switch (operation) {
            case WarpOperation::sync:
                break;
            case WarpOperation::ballot:
            case WarpOperation::any:
            case WarpOperation::all:
                vote = operation == WarpOperation::ballot ? votes
                       : operation == WarpOperation::any  ? votes != 0
                                                          : votes == lanes;
                memcpy(t.exchange.take, &vote, sizeof vote);
                break;
            default:
                if (!(lanes >> t.exchange.source_lane & 1u))
                    fail(
                        "%s: lane %d of warp %d reads lane %d, which is not taking part (mask %08x, live "
                        "%08x), %s:%d",
                        name_of(operation), lane, warp, t.exchange.source_lane, t.mask, lanes,
                        base_name(t.site.file), t.site.line);
                memcpy(t.exchange.take, thread(warp * 32 + t.exchange.source_lane).exchange.give,
                       sizeof t.exchange.take);
        }
    }
    if (operation == WarpOperation::sync) {
        races::warp_barrier(warp, lanes);
        asynchronous::warp_barrier(warp, lanes);
    }
}

// Finishes the operation that `rank` waits in if every live lane of its mask waits in it too.
void release_warp_if_complete(int rank) {
    const Thread& t = thread(rank);
    const int warp = rank / 32;
    const unsigned lanes = live_lanes(warp, t.mask);
    for (int lane = 0; lane < 32; ++lane) {
        if (!(lanes >> lane & 1u)) continue;
        const Thread& other = thread(warp * 32 + lane);
        if (other.state != State::at_warp_operation || other.mask != t.mask) return;
    }
    perform(warp, lanes, t.operation);
    for (int lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1u) make_ready(warp * 32 + lane);
}

void thread_entry() {
#if defined(MIPNERF_EMULATION_ADDRESSES)
    {
        const void* bottom;
        std::size_t bytes;
        __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
        if (machine.host.stack_bytes == 0) {  // the first switch of the program comes from the host
            machine.host.stack_bottom = bottom;
            machine.host.stack_bytes = bytes;
        }
    }
#endif
    for (;;) {  // a fiber lives on and serves the same thread of the following blocks
        const int rank = machine.current;
        machine.body(machine.context);
        if (has_copies_in_flight()) fail("the thread ends without waiting for its asynchronous copies");
        forget_copies();
        thread(rank).state = State::gone;
        --machine.live;
        if (--block_of(rank).live == 0) asynchronous::end_block(rank / machine.block_threads);
        release_block_barrier_if_complete(rank);
        for (int other = rank / 32 * 32; other < machine.count && other < rank / 32 * 32 + 32; ++other)
            if (thread(other).state == State::at_warp_operation) release_warp_if_complete(other);
        run_next();
    }
}

// The blocks first .. first + cluster - 1 along x, alive together.
void run_blocks(dim3 first, int cluster, std::size_t shared_bytes) {
    machine.policy = static_cast<Policy>(machine.random.below(static_cast<int>(Policy::count)));
    machine.live = machine.count;
    for (Block& block : machine.blocks) {
        memset(block.shared, 0xff, shared_bytes);
        block.live = machine.block_threads;
        block.waiting = 0;
    }
    for (int& lanes : machine.arrived) lanes = 0;
    for (int rank = 0; rank < machine.count; ++rank) {
        const dim3 size = indices.block_size;
        const auto r = static_cast<unsigned>(rank % machine.block_threads);
        thread(rank).index = dim3(r % size.x, r / size.x % size.y, r / size.x / size.y);
        thread(rank).block =
            dim3(first.x + static_cast<unsigned>(rank / machine.block_threads), first.y, first.z);
        make_ready(rank);
    }
    races::begin_block(machine.count, machine.blocks[0].shared, shared_bytes);
    if (asynchronous::active()) {
        std::vector<unsigned char*> shared;
        for (const Block& block : machine.blocks) shared.push_back(block.shared);
        asynchronous::begin_blocks(cluster, machine.block_threads, shared, shared_bytes);
    }
    machine.current = -1;
    const int next = choose();
    machine.ready[next / 32] &= ~(1u << (next % 32));
    enter(next);
    switch_fiber(machine.host, thread(next).fiber);
}

struct Mapping {
    const void* start;
    void* memory;
    std::size_t bytes;
};
std::vector<Mapping> mappings;

unsigned char* guarded(std::size_t bytes, std::size_t misalignment) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t total = (bytes + misalignment + 2 * kGuardBytes + page - 1) / page * page;
    unsigned char* memory = races::reserve(total);
    if (!memory) {
        void* mapped = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) fail("no memory for an array of %zu bytes", bytes);
        memory = static_cast<unsigned char*>(mapped);
    }
    unsigned char* start = memory + kGuardBytes + misalignment;
    mappings.push_back({start, memory, total});
    memset(start, 0xff, bytes);
#if defined(MIPNERF_EMULATION_ADDRESSES)
    __asan_poison_memory_region(memory, kGuardBytes + misalignment);
    __asan_poison_memory_region(start + bytes, static_cast<std::size_t>(memory + total - (start + bytes)));
#endif
    return start;
}

}  // namespace

// --------------------------------------------------------------------------------------------------------------
// interface

void fail(const char* format, ...) {
    char text[8192];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (machine.kernel)
        fprintf(stderr, "cuda emulation: %s: block (%u, %u, %u), thread %d: %s\n", machine.kernel,
                indices.block.x, indices.block.y, indices.block.z,
                machine.current < 0 ? -1 : machine.current % machine.block_threads, text);
    else
        fprintf(stderr, "cuda emulation: %s\n", text);
    fflush(nullptr);
    _exit(70);
}

void set_seed(std::uint64_t seed) {
    machine.random.state = seed;
}
Exchange& exchange() {
    return thread(machine.current).exchange;
}
unsigned char* shared_bytes() {
    return block_of(machine.current).shared;
}

// Whether the environment asks for this barrier to be left out ("file:line"), for tests that demand that it
// is missed.
static bool is_omitted(Site site) {
    static const char* const omitted = getenv("MIPNERF_EMULATION_OMIT");
    return omitted != nullptr &&
           std::string(base_name(site.file)) + ":" + std::to_string(site.line) == omitted;
}

bool atomics_are_plain() {
    static const bool plain = getenv("MIPNERF_EMULATION_PLAIN_ATOMICS") != nullptr;
    return plain;
}

void block_barrier(Site site) {
    if (is_omitted(site)) return;
    Thread& t = thread(machine.current);
    t.state = State::at_block_barrier;
    t.site = site;
    ++block_of(machine.current).waiting;
    release_block_barrier_if_complete(machine.current);
    run_next();
}

void warp_rendezvous(WarpOperation operation, unsigned mask, Site site) {
    const int rank = machine.current, warp = rank / 32, lane = rank % 32;
    Thread& t = thread(rank);
    if (!(mask >> lane & 1u))
        fail("%s: lane %d is not in the mask %08x that it passes, %s:%d", name_of(operation), lane, mask,
             base_name(site.file), site.line);
    t.operation = operation;
    t.mask = mask;
    t.site = site;
    for (int i = 0; i < 32 && warp * 32 + i < machine.count; ++i) {
        const Thread& other = thread(warp * 32 + i);
        if (i == lane || other.state != State::at_warp_operation || !(mask >> i & 1u) ||
            !(other.mask >> lane & 1u))
            continue;
        if (other.operation != operation || other.mask != mask || other.site.line != site.line ||
            strcmp(other.site.file, site.file) != 0)
            fail("divergence: lane %d calls %s with mask %08x at %s:%d while lane %d is %s", lane,
                 name_of(operation), mask, base_name(site.file), site.line, i, describe(other).c_str());
    }
    t.state = State::at_warp_operation;
    release_warp_if_complete(rank);
    run_next();
}

void warp_collective(const char* name, void (*perform)(void* const lanes[32]), void* mine, Site site) {
    const int warp = machine.current / 32, first = warp * 32;
    Thread& t = thread(machine.current);
    t.collective = name;
    t.handed_over = mine;
    t.site = site;
    if (first + 32 > machine.count) fail("%s needs 32 lanes, the block ends before", name);
    for (int rank = first; machine.arrived[warp] > 0; ++rank) {  // compare with any one that is here already
        const Thread& other = thread(rank);
        if (other.state != State::at_collective) continue;
        if (other.collective != name || other.site.line != site.line || other.site.file != site.file)
            fail("divergence: lane %d calls %s at %s:%d while lane %d is %s", machine.current - first, name,
                 base_name(site.file), site.line, rank - first, describe(other).c_str());
        break;
    }
    t.state = State::at_collective;
    if (++machine.arrived[warp] == 32) {
        void* lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = thread(first + i).handed_over;
        perform(lanes);
        for (int i = 0; i < 32; ++i) make_ready(first + i);
        machine.arrived[warp] = 0;
    }
    run_next();
}

void run_grid(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(const void*),
              const void* context, int cluster) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64 || grid.y > 65535 || grid.z > 65535 ||
        grid.x > 0x7fffffffu)
        fail("%s: grid (%u, %u, %u) of blocks (%u, %u, %u) cannot be launched", name, grid.x, grid.y, grid.z,
             block.x, block.y, block.z);
    if (cluster < 0 || cluster > 8 || (cluster > 0 && grid.x % static_cast<unsigned>(cluster) != 0) ||
        (cluster > 0 && (threads % 32 != 0 || threads * static_cast<std::uint64_t>(cluster) > 1024)))
        fail("%s: a grid of %u blocks of %u threads cannot be launched in clusters of %d", name, grid.x,
             static_cast<unsigned>(threads), cluster);
    if (shared_bytes > kMostSharedBytes)
        fail("%s: %zu bytes of shared memory are asked for, no GPU has more than %zu", name, shared_bytes,
             kMostSharedBytes);
    machine.kernel = name;
    machine.body = body;
    machine.context = context;
    const int together = cluster > 0 ? cluster : 1;
    machine.block_threads = static_cast<int>(threads);
    machine.count = machine.block_threads * together;
    while (static_cast<int>(machine.threads.size()) < machine.count) {
        machine.threads.push_back(std::make_unique<Thread>());
        prepare_fiber(machine.threads.back()->fiber, thread_entry);
    }
    indices.block_size = block;
    indices.grid_size = grid;
    machine.blocks.resize(static_cast<std::size_t>(together));
    for (Block& b : machine.blocks) b.shared = guarded(shared_bytes, 0);
    races::begin_launch();
    asynchronous::begin_launch(cluster > 0);

    const auto step = static_cast<std::uint32_t>(together);
    std::vector<std::uint32_t> order(std::size_t{grid.x} * grid.y * grid.z / step);
    std::iota(order.begin(), order.end(), 0u);
    for (std::size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[static_cast<std::size_t>(machine.random.below(static_cast<int>(i)))]);
    for (const std::uint32_t place : order) {
        const std::uint32_t i = place * step;
        run_blocks(dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y), together, shared_bytes);
    }
    asynchronous::begin_launch(false);
    races::end_launch();
    machine.kernel = nullptr;
    machine.current = -1;
}

void* allocate(const char* name, std::size_t bytes, std::size_t misalignment) {
    unsigned char* start = guarded(bytes, misalignment);
    races::name_array(name, start, bytes);
    return start;
}

bool is_outside_arrays([[maybe_unused]] const void* address, [[maybe_unused]] std::size_t bytes) {
#if defined(MIPNERF_EMULATION_ADDRESSES)
    return __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr;
#else
    return false;
#endif
}

void make_read_only(const void* address) {
    races::make_read_only(address);
#if !defined(MIPNERF_EMULATION_RACES)
    for (const Mapping& mapping : mappings)
        if (mapping.start == address) mprotect(mapping.memory, mapping.bytes, PROT_READ);
#endif
}

int current_thread() {
    return machine.current;
}
int random_below(int n) {
    return machine.random.below(n);
}

void park(const char* what, Site site) {
    Thread& t = thread(machine.current);
    t.state = State::parked;
    t.parked_in = what;
    t.site = site;
    run_next();
}

void wake(int rank) {
    make_ready(rank);
}

}  // namespace mipnerf::emulation
