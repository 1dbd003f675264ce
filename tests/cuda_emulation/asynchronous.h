// What the scheduler (emulation.cpp) and the asynchronous operations (hopper_emulation.cpp) need of each
// other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/device.cuh"

namespace mipnerf::emulation {

int current_thread();  // rank in the cluster, -1 on the host
int random_below(int n);
bool is_outside_arrays(const void* address, std::size_t bytes);  // in the "memory" build; else false
// The current thread waits until wake(); another one goes on.
void park(const char* what, Site site);
void wake(int rank);

namespace asynchronous {

// Whether the launch that runs now has asynchronous operations, and the order between its threads is followed
// by vector clocks.
bool active();
void begin_launch(bool is_active);
void begin_blocks(int blocks, int block_threads, const std::vector<unsigned char*>& shared,
                  std::size_t shared_bytes);
void end_block(int block);
// Lets some of the work that is under way happen; `must` where no thread can go on without it. Whether any
// did.
bool step(bool must);
void block_barrier(int begin, int end);  // all threads of ranks begin .. end - 1 are in it
void warp_barrier(int warp, unsigned lanes);
std::string describe();  // of the barriers, for the report of a deadlock

// The race detector's questions, in launches where active(): whether what `earlier` did at `clock` comes
// before what the current thread does now, and what it is to be told of accesses to shared memory.
bool is_ordered(int earlier, std::uint32_t clock);
std::uint32_t clock_of_current();
enum class Access { read, write };
bool is_shared(const void* address);
// True where the byte was written by an asynchronous operation.
bool note_access(const void* address, std::size_t bytes, Access access);

}  // namespace asynchronous
}  // namespace mipnerf::emulation
