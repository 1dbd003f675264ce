// A race detector for the emulation: the runtime behind code compiled with -fsanitize=thread, in place of
// ThreadSanitizer's own.
//
// Every four bytes of device memory have a cell with the accesses since the last one that orders all others;
// each access says which of the bytes it is to, so the verdict is that of every byte by itself. Order comes
// from barriers alone, so the verdict does not depend on which thread happened to run first:
//   * threads of one block: a block barrier orders everything before it and everything after (an epoch
//   counter);
//   * lanes of one warp: warp_sync joins the vector clocks of its lanes;
//   * blocks of one launch: nothing orders them; launches follow each other;
//   * in launches of clusters: the vector clocks of hopper_emulation.cpp, which know its barriers as well.
//
// What whole blocks read, every thread of them the same, is most of what there is to check: the lanes of a
// warp that did the same at the same clock are one entry of a cell.
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

constexpr unsigned kCellBytes = 4;

enum class Kind : std::uint8_t { read, read_only_load, write, atomic };
// Sets of kinds: four bits for each kind, one for each byte of a cell that it happened to.
using Kinds = std::uint16_t;
using Bytes = std::uint8_t;  // of a cell, a bit for each

constexpr Kinds kinds(Kind kind, unsigned bytes) {
    return static_cast<Kinds>(bytes << 4 * static_cast<unsigned>(kind));
}
constexpr Kinds kinds(Kind kind, Kind other, unsigned bytes) {
    return static_cast<Kinds>(kinds(kind, bytes) | kinds(other, bytes));
}
constexpr Kinds reads(unsigned bytes) {
    return kinds(Kind::read, Kind::read_only_load, bytes);
}
constexpr Kinds writes(unsigned bytes) {
    return kinds(Kind::write, Kind::atomic, bytes);
}
// The bytes of a set, whatever happened to them.
constexpr Bytes bytes_of(Kinds set) {
    return static_cast<Bytes>((set | set >> 4 | set >> 8 | set >> 12) & 15u);
}

// Of those lanes of a warp that did the same from the same place in the program at the same time.
struct Access {
    std::uint32_t clock;
    std::uint32_t place;  // program counter; the programs are not position-independent
    std::uint32_t lanes;
    std::uint16_t warp;
    Kind kind;
    Bytes bytes;
};

// What happened to four bytes in one launch. All zero means: nothing yet.
struct Cell {
    std::uint32_t launch, block,
        epoch;  // serial numbers; what belongs to an older one is forgotten at the next access
    Kinds by_other_blocks, by_this_block;
    std::uint16_t count, capacity;  // accesses of this epoch, the first one in place
    Bytes copying;                  // those that an asynchronous copy may write at any time
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

bool is_write(Kind kind) {
    return kind == Kind::write || kind == Kind::atomic;
}

// What may not meet `kind` without a barrier between.
Kinds conflicts(Kind kind, unsigned bytes) {
    if (kind == Kind::write) return static_cast<Kinds>(reads(bytes) | writes(bytes));
    return kind == Kind::atomic ? static_cast<Kinds>(reads(bytes) | kinds(Kind::write, bytes))
                                : writes(bytes);
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

bool is_ordered(int earlier, std::uint32_t clock, int thread) {
    if (asynchronous::active()) return asynchronous::is_ordered(earlier, clock);
    return earlier / 32 == thread / 32 && clocks[thread].lane[earlier % 32] >= clock;
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

// The last access takes the place of access `i`.
void drop(Cell& cell, int i) {
    access_at(cell, i) = access_at(cell, cell.count - 1);
    --cell.count;
}

void bring_up_to_date(Cell& cell) {
    if (cell.block != block) cell.copying = 0;
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

// What does an access, and to what.
struct Doing {
    Kind kind;
    std::uint32_t place, clock;
    int thread;
    bool is_shared, is_brought, is_to_an_input;
};

// The first of some bytes of a cell, for a message.
const unsigned char* first_of(const unsigned char* cell, unsigned bytes) {
    return cell + __builtin_ctz(bytes);
}

// An earlier one that `doing` may not meet: fails unless what this thread did is all there is, or is ordered.
void require_order(const Access& earlier, const Doing& doing, const unsigned char* start, unsigned bytes) {
    std::uint32_t lanes = earlier.lanes;
    if (earlier.warp == doing.thread / 32) lanes &= ~(1u << doing.thread % 32);
    for (; lanes != 0; lanes &= lanes - 1) {
        const int other = earlier.warp * 32 + __builtin_ctz(lanes);
        if (is_ordered(other, earlier.clock, doing.thread)) continue;
        fail("race: %s %s, which thread %d %s with no barrier between\n  place: 0x%x\n  place: 0x%x",
             verb(doing.kind), describe(first_of(start, earlier.bytes & bytes)).c_str(), other,
             verb(earlier.kind), doing.place, earlier.place);
    }
}

// start: of the cell; bytes: of it, at least one.
void check_cell(const unsigned char* start, unsigned bytes, const Doing& doing) {
    Cell& cell = cells[static_cast<std::size_t>(start - arena) / kCellBytes];
    bring_up_to_date(cell);
    const Kind kind = doing.kind;
    const Kinds others = doing.is_shared ? Kinds{0} : cell.by_other_blocks;

    if (const unsigned copying = cell.copying & bytes)
        fail("%s %s, which an asynchronous copy may still be writing\n  place: 0x%x", verb(kind),
             describe(first_of(start, copying)).c_str(), doing.place);
    if (doing.is_shared && kind == Kind::read_only_load)
        fail("load_pack reads global memory, not %s (load_pack_shared does)\n  place: 0x%x",
             describe(first_of(start, bytes)).c_str(), doing.place);
    if (doing.is_shared && !is_write(kind) && !doing.is_brought)
        if (const unsigned unwritten = bytes & ~unsigned{bytes_of(cell.by_this_block & writes(bytes))})
            fail("reads %s, which this block has not written\n  place: 0x%x",
                 describe(first_of(start, unwritten)).c_str(), doing.place);
    if (doing.is_to_an_input)
        fail("writes to an input: %s\n  place: 0x%x", describe(first_of(start, bytes)).c_str(), doing.place);
    if (const unsigned met = bytes_of(others & conflicts(kind, bytes)))
        fail("race between blocks: %s %s, which another block of the launch %s\n  place: 0x%x", verb(kind),
             describe(first_of(start, met)).c_str(), (others & writes(met)) ? "writes" : "reads",
             doing.place);

    const std::uint16_t warp = static_cast<std::uint16_t>(doing.thread / 32);
    const std::uint32_t lane = 1u << doing.thread % 32;
    const unsigned forbidden = conflicts(kind, 1);
    Access* same = nullptr;
    for (int i = 0; i < cell.count; ++i) {
        Access& earlier = access_at(cell, i);
        if ((earlier.bytes & bytes) && (forbidden & kinds(earlier.kind, 1)))
            require_order(earlier, doing, start, bytes);
        if (earlier.warp != warp || earlier.kind != kind || earlier.bytes != bytes) continue;
        if (earlier.clock == doing.clock && earlier.place == doing.place)
            same = &earlier;
        else
            earlier.lanes &= ~lane;  // what it does now is later
    }
    cell.by_this_block |= kinds(kind, bytes);
    const Kinds all = others | cell.by_this_block;
    if (const unsigned loaded =
            bytes & (all >> 4 * static_cast<unsigned>(Kind::read_only_load)) & bytes_of(all & writes(bytes)))
        fail(
            "%s is loaded through the read-only path (load_pack, ldg128) and written in the same launch\n  "
            "place: 0x%x",
            describe(first_of(start, loaded)).c_str(), doing.place);

    if (kind == Kind::write) {  // everything before is ordered before this one
        for (int i = cell.count - 1; i >= 0; --i) {
            Access& earlier = access_at(cell, i);
            earlier.bytes &= static_cast<Bytes>(~bytes);
            if (earlier.bytes == 0) drop(cell, i);
        }
        same = nullptr;
    }
    if (same) {
        same->lanes |= lane;
        return;
    }
    for (int i = cell.count - 1; i >= 0; --i)
        if (access_at(cell, i).lanes == 0) drop(cell, i);
    append(cell, Access{doing.clock, doing.place, lane, warp, kind, static_cast<Bytes>(bytes)});
}

inline void check_at(const void* pointer, std::size_t bytes, Kind kind, std::uint32_t place) {
    const auto* address = static_cast<const unsigned char*>(pointer);
    if (!running || address < arena || address >= arena + arena_used) return;
    const int thread = current_thread();
    const bool is_asynchronous = asynchronous::active(), shared = is_shared(address);
    Doing doing{kind,
                place,
                is_asynchronous ? asynchronous::clock_of_current() : clocks[thread].lane[thread % 32],
                thread,
                shared,
                false,
                is_write(kind) && !shared && is_read_only(address)};
    if (is_asynchronous && shared)  // whether an asynchronous operation wrote there
        doing.is_brought = asynchronous::note_access(
            pointer, bytes, is_write(kind) ? asynchronous::Access::write : asynchronous::Access::read);
    std::size_t offset = static_cast<std::size_t>(address - arena) % kCellBytes;
    for (const unsigned char* start = address - offset; start < address + bytes; start += kCellBytes) {
        const std::size_t left = static_cast<std::size_t>(address + bytes - start);
        const unsigned end = left < kCellBytes ? static_cast<unsigned>(left) : kCellBytes;
        check_cell(start, (1u << end) - (1u << offset), doing);
        offset = 0;
    }
}
inline void check(const void* pointer, std::size_t bytes, Kind kind, const void* place) {
    check_at(pointer, bytes, kind, static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(place)));
}

// Of whole cells, as all asynchronous copies are.
void set_copying(const void* to, std::size_t bytes, bool is_under_way) {
    const auto start = static_cast<std::size_t>(static_cast<const unsigned char*>(to) - arena);
    for (std::size_t i = start / kCellBytes; i < (start + bytes) / kCellBytes; ++i)
        cells[i].copying = is_under_way ? 15 : 0;
}

}  // namespace

namespace races {

unsigned char* reserve(std::size_t bytes) {
    if (!arena) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        void* shadow =
            mmap(nullptr, kArenaBytes / kCellBytes * sizeof(Cell), PROT_READ | PROT_WRITE, flags, -1, 0);
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
    set_copying(to, bytes, true);
}

void begin_copy_from(const void* from, std::size_t bytes, std::uint32_t place) {
    check_at(from, bytes, Kind::read, place);
}

void finish_copy(const void* to, std::size_t bytes, std::uint32_t place) {
    set_copying(to, bytes, false);
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
