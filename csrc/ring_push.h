// ring_push_: what a push is, and its slot arithmetic, compiled by the C++ compiler and by nvcc and used by both.
//
// K classes · S slots per class · D channels · R rows of the push. Row and slot numbers are 32-bit, offsets 64-bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MCIC_HOST_DEVICE __host__ __device__
#else
#define MCIC_HOST_DEVICE
#endif

namespace mcic {

// A checked push. Rows of bank and contexts are moved as `units` pieces of `unit` bytes; their strides count units, all
// other strides count elements.
struct RingPush {
  char* bank;                  // [K, S, units]
  int64_t* ids;                // [K, S]
  int32_t* counts;             // [K]
  int32_t* cursor;             // [K]
  int32_t* rejected;           // one number
  const char* contexts;        // [R, units]
  const int32_t* labels;       // [R]
  const int64_t* context_ids;  // [R]
  int32_t classes, slots, rows;
  int32_t unit;  // 1, 2, 4, 8 or 16
  int64_t units;
  int64_t bank_class_stride, bank_slot_stride, bank_unit_stride;
  int64_t ids_class_stride, ids_slot_stride;
  int64_t counts_stride, cursor_stride;
  int64_t context_row_stride, context_unit_stride;
  int64_t labels_stride, context_ids_stride;
};

// Whether row `rank` of a class's `arrivals` is still there after the push: of more than S rows the last S stay.
MCIC_HOST_DEVICE inline bool stays(int32_t rank, int32_t arrivals, int32_t slots) { return rank >= arrivals - slots; }

// The slot of row `rank`. Unsigned, so that even a damaged cursor leads to a slot of its class.
MCIC_HOST_DEVICE inline int32_t slot_of(int32_t cursor, int32_t rank, int32_t slots) {
  return static_cast<int32_t>((static_cast<uint32_t>(cursor) + static_cast<uint32_t>(rank)) %
                              static_cast<uint32_t>(slots));
}

// The slot after the last row's: where the next push goes on.
MCIC_HOST_DEVICE inline int32_t next_cursor(int32_t cursor, int32_t arrivals, int32_t slots) {
  return slot_of(cursor, arrivals, slots);
}

// Valid slots after the push.
MCIC_HOST_DEVICE inline int32_t next_count(int32_t count, int32_t arrivals, int32_t slots) {
  return arrivals >= slots - count ? slots : count + arrivals;
}

// Throws std::invalid_argument, with nothing changed, if a label is K or more.
void ring_push_cpu(const RingPush& push);

// Enqueues the push on a cudaStream_t of the current device. Rows whose label is K or more are skipped and counted in
// `rejected`. Throws std::runtime_error if the launch fails.
void launch_ring_push(const RingPush& push, void* stream);

// CUDART_VERSION of the toolkit that compiled the kernel: 13000 for 13.0.
int cuda_toolkit();

}  // namespace mcic
