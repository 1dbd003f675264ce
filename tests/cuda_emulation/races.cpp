// A race detector for the emulation: the runtime behind code compiled with -fsanitize=thread, in place of
// ThreadSanitizer's own.
//
// Every byte of device memory has a cell with the accesses since the last one that orders all others. Order
// comes from barriers alone, so the verdict does not depend on which thread happened to run first:
//   * threads of one block: a block barrier orders everything before it and everything after (an epoch
//   counter);
//   * lanes of one warp: warp_sync joins the vector clocks of its lanes;
//   * blocks of one launch: nothing orders them; launches follow each other;
//   * in launches of clusters: the vector clocks of hopper_emulation.cpp, which know its barriers as well.
#include "races.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "asynchronous.h"

namespace mipnerf::emulation {

namespace {

constexpr std::size_t kArenaBytes = std::size_t{256} << 20;

enum class Kind : std::uint8_t {
    read = 1,
    read_only_load = 2,
    write = 4,
    atomic = 8
};  // bits, to be kept in sets
using Kinds = std::uint8_t;
constexpr Kinds kReads = 1 | 2, kWrites = 4 | 8;

struct Access {
    std::uint32_t clock;
    std::uint32_t place;  // program counter; the programs are not position-independent
    std::uint16_t thread;
    Kind kind;
};

// What happened to one byte in one launch. All zero means: nothing yet.
struct Cell {
    std::uint32_t launch, block,
        epoch;  // serial numbers; what belongs to an older one is forgotten at the next access
    Kinds by_other_blocks, by_this_block;
    std::uint16_t count, capacity;  // accesses of this epoch, the first one in place
    bool copying;                   // an asynchronous copy may write it at any time
    Access first;
    Access* more;
};

struct Array {
    std::string name;
    const unsigned char* start;
    std::size_t bytes;
    bool read_only;
};

struct ThreadClock {
    std::uint32_t lane[32];
};

unsigned char* arena = nullptr;
std::size_t arena_used = 0;
Cell* cells = nullptr;
std::vector<Array> arrays;
const unsigned char* shared_start = nullptr;
std::size_t shared_size = 0;
bool running = false;
std::uint32_t launch = 0, block = 0, epoch = 0;
ThreadClock clocks[1024];

Kinds bit(Kind kind) {
    return static_cast<Kinds>(kind);
}
bool is_write(Kind kind) {
    return (bit(kind) & kWrites) != 0;
}

// The kinds that may not meet `kind` without a barrier between.
Kinds conflicts(Kind kind) {
    if (kind == Kind::write) return kReads | kWrites;
    return kind == Kind::atomic ? kReads | bit(Kind::write) : kWrites;
}

const char* verb(Kind kind) {
    switch (kind) {
        case Kind::write:
            return "writes";
        case Kind::atomic:
            return "updates atomically";
        default:
            return "reads";
    }
}

bool is_shared(const unsigned char* address) {
    if (asynchronous::active()) return asynchronous::is_shared(address);
    return address >= shared_start && address < shared_start + shared_size;
}

const Array* array_at(const unsigned char* address) {
    for (const Array& array : arrays)
        if (address >= array.start && address < array.start + array.bytes) return &array;
    return nullptr;
}

bool is_read_only(const unsigned char* address) {
    const Array* array = array_at(address);
    return array && array->read_only;
}

std::string describe(const unsigned char* address) {
    if (is_shared(address) && asynchronous::active()) return "a byte of shared memory";
    if (is_shared(address)) return "byte " + std::to_string(address - shared_start) + " of shared memory";
    if (const Array* array = array_at(address))
        return "byte " + std::to_string(address - array->start) + " of the array '" + array->name + "'";
    return "an address outside every array and outside shared memory";
}

bool is_ordered(const Access& earlier, int thread) {
    if (asynchronous::active()) return asynchronous::is_ordered(earlier.thread, earlier.clock);
    return earlier.thread / 32 == thread / 32 && clocks[thread].lane[earlier.thread % 32] >= earlier.clock;
}

Access& access_at(Cell& cell, int i) {
    return i == 0 ? cell.first : cell.more[i - 1];
}

void append(Cell& cell, const Access& access) {
    if (cell.count > 0 && cell.count - 1 == cell.capacity) {
        cell.capacity = static_cast<std::uint16_t>(cell.capacity ? 2 * cell.capacity : 3);
        cell.more = static_cast<Access*>(realloc(cell.more, cell.capacity * sizeof(Access)));
    }
    access_at(cell, cell.count++) = access;
}

void bring_up_to_date(Cell& cell) {
    if (cell.block != block) cell.copying = false;
    if (cell.launch != launch) {
        cell.by_other_blocks = cell.by_this_block = 0;
    } else if (cell.block != block) {
        cell.by_other_blocks |= cell.by_this_block;
        cell.by_this_block = 0;
    }
    if (cell.epoch != epoch)
        cell.count = 0;  // block barriers ordered them before everything that can come now
    cell.launch = launch;
    cell.block = block;
    cell.epoch = epoch;
}

void check_byte(const unsigned char* address, Kind kind, std::uint32_t place, bool is_brought) {
    Cell& cell = cells[address - arena];
    bring_up_to_date(cell);
    const int thread = current_thread();
    const bool shared = is_shared(address);
    const Kinds others = shared ? 0 : cell.by_other_blocks;

    if (cell.copying)
        fail("%s %s, which an asynchronous copy may still be writing\n  place: 0x%x", verb(kind),
             describe(address).c_str(), place);
    if (shared && kind == Kind::read_only_load)
        fail("load_pack reads global memory, not %s (load_pack_shared does)\n  place: 0x%x",
             describe(address).c_str(), place);
    if (shared && !is_write(kind) && !is_brought && !(cell.by_this_block & kWrites))
        fail("reads %s, which this block has not written\n  place: 0x%x", describe(address).c_str(), place);
    if (is_write(kind) && is_read_only(address))
        fail("writes to an input: %s\n  place: 0x%x", describe(address).c_str(), place);
    if (others & conflicts(kind))
        fail("race between blocks: %s %s, which another block of the launch %s\n  place: 0x%x", verb(kind),
             describe(address).c_str(), (others & kWrites) ? "writes" : "reads", place);

    const std::uint32_t clock =
        asynchronous::active() ? asynchronous::clock_of_current() : clocks[thread].lane[thread % 32];
    Access* mine = nullptr;
    for (int i = 0; i < cell.count; ++i) {
        Access& earlier = access_at(cell, i);
        if (earlier.thread == thread) {
            if (earlier.kind == kind) mine = &earlier;
        } else if ((bit(earlier.kind) & conflicts(kind)) && !is_ordered(earlier, thread)) {
            fail("race: %s %s, which thread %d %s with no barrier between\n  place: 0x%x\n  place: 0x%x",
                 verb(kind), describe(address).c_str(), earlier.thread, verb(earlier.kind), place,
                 earlier.place);
        }
    }
    cell.by_this_block |= bit(kind);
    if (const Kinds all = others | cell.by_this_block; (all & bit(Kind::read_only_load)) && (all & kWrites))
        fail(
            "%s is loaded through the read-only path (load_pack, ldg128) and written in the same launch\n  "
            "place: 0x%x",
            describe(address).c_str(), place);

    if (kind == Kind::write) {  // everything before is ordered before this one
        cell.count = 0;
        mine = nullptr;
    }
    if (mine)
        mine->clock = clock;
    else
        append(cell, Access{clock, place, static_cast<std::uint16_t>(thread), kind});
}

inline void check_at(const void* pointer, std::size_t bytes, Kind kind, std::uint32_t place) {
    const auto* address = static_cast<const unsigned char*>(pointer);
    if (!running || address < arena || address >= arena + arena_used) return;
    // Whether an asynchronous operation wrote there.
    bool is_brought = false;
    if (asynchronous::active() && is_shared(address))
        is_brought = asynchronous::note_access(
            pointer, bytes, is_write(kind) ? asynchronous::Access::write : asynchronous::Access::read);
    for (std::size_t i = 0; i < bytes; ++i) check_byte(address + i, kind, place, is_brought);
}
inline void check(const void* pointer, std::size_t bytes, Kind kind, const void* place) {
    check_at(pointer, bytes, kind, static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(place)));
}

}  // namespace

namespace races {

unsigned char* reserve(std::size_t bytes) {
    if (!arena) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        void* shadow = mmap(nullptr, kArenaBytes * sizeof(Cell), PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED || shadow == MAP_FAILED) fail("no memory for the race detector");
        arena = static_cast<unsigned char*>(memory);
        cells = static_cast<Cell*>(shadow);
    }
    if (bytes > kArenaBytes - arena_used)
        fail("the arrays of an emulated program are limited to %zu bytes together", kArenaBytes);
    unsigned char* start = arena + arena_used;
    arena_used += bytes;
    return start;
}

void name_array(const char* name, const unsigned char* start, std::size_t bytes) {
    arrays.push_back({name, start, bytes, false});
}

void make_read_only(const void* start) {
    for (Array& array : arrays)
        if (array.start == start) array.read_only = true;
}

void begin_launch() {
    ++launch;
    running = true;
}
void end_launch() {
    running = false;
}

void begin_block(int threads, const unsigned char* shared, std::size_t shared_bytes) {
    ++block;
    ++epoch;
    shared_start = shared;
    shared_size = shared_bytes;
    memset(clocks, 0, sizeof(ThreadClock) * static_cast<std::size_t>(threads));
    for (int thread = 0; thread < threads; ++thread) clocks[thread].lane[thread % 32] = 1;
}

void block_barrier() {
    if (!asynchronous::active()) ++epoch;
}

void warp_barrier(int warp, unsigned lanes) {
    ThreadClock joined{};
    for (int lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1u)
            for (int i = 0; i < 32; ++i) {
                const std::uint32_t clock = clocks[warp * 32 + lane].lane[i];
                if (clock > joined.lane[i]) joined.lane[i] = clock;
            }
    for (int lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1u) {
            clocks[warp * 32 + lane] = joined;
            ++clocks[warp * 32 + lane].lane[lane];
        }
}

void begin_copy(const void* to, std::size_t bytes, std::uint32_t place) {
    check_at(to, bytes, Kind::write, place);
    for (std::size_t i = 0; i < bytes; ++i)
        cells[static_cast<const unsigned char*>(to) + i - arena].copying = true;
}

void begin_copy_from(const void* from, std::size_t bytes, std::uint32_t place) {
    check_at(from, bytes, Kind::read, place);
}

void finish_copy(const void* to, std::size_t bytes, std::uint32_t place) {
    for (std::size_t i = 0; i < bytes; ++i)
        cells[static_cast<const unsigned char*>(to) + i - arena].copying = false;
    check_at(to, bytes, Kind::write, place);
}

}  // namespace races

void note_atomic(const void* address, std::size_t bytes) {
    check(address, bytes, Kind::atomic, __builtin_return_address(0));
}
void note_read_only_load(const void* address, std::size_t bytes) {
    check(address, bytes, Kind::read_only_load, __builtin_return_address(0));
}

}  // namespace mipnerf::emulation

// ------------------------------------------------------------------- the calls that -fsanitize=thread puts
// into the programs

using mipnerf::emulation::check;
using mipnerf::emulation::Kind;

#define MIPNERF_ACCESS(function, bytes, kind)                           \
    extern "C" void function(void* address) {                           \
        check(address, bytes, Kind::kind, __builtin_return_address(0)); \
    }
MIPNERF_ACCESS(__tsan_read1, 1, read)
MIPNERF_ACCESS(__tsan_read2, 2, read)
MIPNERF_ACCESS(__tsan_read4, 4, read)
MIPNERF_ACCESS(__tsan_read8, 8, read)
MIPNERF_ACCESS(__tsan_read16, 16, read)
MIPNERF_ACCESS(__tsan_unaligned_read2, 2, read)
MIPNERF_ACCESS(__tsan_unaligned_read4, 4, read)
MIPNERF_ACCESS(__tsan_unaligned_read8, 8, read)
MIPNERF_ACCESS(__tsan_unaligned_read16, 16, read)
MIPNERF_ACCESS(__tsan_volatile_read1, 1, read)
MIPNERF_ACCESS(__tsan_volatile_read2, 2, read)
MIPNERF_ACCESS(__tsan_volatile_read4, 4, read)
MIPNERF_ACCESS(__tsan_volatile_read8, 8, read)
MIPNERF_ACCESS(__tsan_volatile_read16, 16, read)
MIPNERF_ACCESS(__tsan_write1, 1, write)
MIPNERF_ACCESS(__tsan_write2, 2, write)
MIPNERF_ACCESS(__tsan_write4, 4, write)
MIPNERF_ACCESS(__tsan_write8, 8, write)
MIPNERF_ACCESS(__tsan_write16, 16, write)
MIPNERF_ACCESS(__tsan_unaligned_write2, 2, write)
MIPNERF_ACCESS(__tsan_unaligned_write4, 4, write)
MIPNERF_ACCESS(__tsan_unaligned_write8, 8, write)
MIPNERF_ACCESS(__tsan_unaligned_write16, 16, write)
MIPNERF_ACCESS(__tsan_volatile_write1, 1, write)
MIPNERF_ACCESS(__tsan_volatile_write2, 2, write)
MIPNERF_ACCESS(__tsan_volatile_write4, 4, write)
MIPNERF_ACCESS(__tsan_volatile_write8, 8, write)
MIPNERF_ACCESS(__tsan_volatile_write16, 16, write)
#undef MIPNERF_ACCESS

extern "C" {
void __tsan_read_range(void* address, unsigned long bytes) {
    check(address, bytes, Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
    check(address, bytes, Kind::write, __builtin_return_address(0));
}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
