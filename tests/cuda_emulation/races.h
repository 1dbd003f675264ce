// What the scheduler tells the race detector (races.cpp); nothing in the build that runs under
// AddressSanitizer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mipnerf::emulation {

int current_thread();  // rank in the block, -1 on the host
int random_below(int n);

// Of the running thread (tensor_core.cpp).
bool has_copies_in_flight();
void forget_copies();

namespace races {

#if defined(MIPNERF_EMULATION_RACES)
unsigned char* reserve(std::size_t bytes);  // memory whose accesses are watched
void name_array(const char* name, const unsigned char* start, std::size_t bytes);
void make_read_only(const void* start);
void begin_launch();
void end_launch();
void begin_block(int threads, const unsigned char* shared, std::size_t shared_bytes);
void block_barrier();
void warp_barrier(int warp, unsigned lanes);
// An asynchronous copy is a write of the thread that asked for it, and another when it lands; between the two
// nobody may touch the bytes. place: a program counter.
void begin_copy(const void* to, std::size_t bytes, std::uint32_t place);
void begin_copy_from(const void* from, std::size_t bytes, std::uint32_t place);
void finish_copy(const void* to, std::size_t bytes, std::uint32_t place);
#else
inline unsigned char* reserve(std::size_t) {
    return nullptr;
}
inline void name_array(const char*, const unsigned char*, std::size_t) {}
inline void make_read_only(const void*) {}
inline void begin_launch() {}
inline void end_launch() {}
inline void begin_block(int, const unsigned char*, std::size_t) {}
inline void block_barrier() {}
inline void warp_barrier(int, unsigned) {}
inline void begin_copy(const void*, std::size_t, std::uint32_t) {}
inline void begin_copy_from(const void*, std::size_t, std::uint32_t) {}
inline void finish_copy(const void*, std::size_t, std::uint32_t) {}
#endif

}  // namespace races
}  // namespace mipnerf::emulation
