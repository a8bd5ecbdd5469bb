// ring_push_ on the GPU, in one launch: a block per class, so that nobody else touches the class's queue.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ring_push.h"

namespace mcic {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarp = 32;
constexpr int kPieces = 4;  // loads that a thread has under way

// Threads that copy one row together: a power of two, just enough to load the whole row at once if that can be.
__device__ int team_size(int64_t units) {
  int team = kWarp;
  while (team < kThreads && team * kPieces < units) team *= 2;
  return team;
}

// What thread `member` of a team copies of a row: all its loads first, since the compiler cannot know that the stores
// go elsewhere.
template <typename Unit>
__device__ void copy_row(const RingPush& push, Unit* to, const Unit* from, int member, int team) {
  for (int64_t first = member; first < push.units; first += kPieces * team) {
    Unit pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t u = first + i * team;
      if (u < push.units) pieces[i] = from[u * push.context_unit_stride];
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t u = first + i * team;
      if (u < push.units) to[u * push.bank_unit_stride] = pieces[i];
    }
  }
}

// Numbers the threads whose `chosen` is true in thread order; returns how many there are and leaves the number of each
// in `rank`. Every thread of the block calls it; nobody returns before all have come.
__device__ int number_chosen(bool chosen, int& rank, int (&warp_counts)[kThreads / kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned votes = __ballot_sync(0xffffffffu, chosen);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w == warp) before = total;
    total += warp_counts[w];
  }
  rank = before + __popc(votes & ((1u << lane) - 1));
  __syncthreads();
  return total;
}

// Rows of this class in the whole push; the first block counts the labels out of range on the way.
__device__ int count_arrivals(const RingPush& push, int k) {
  int arrivals = 0, rejected = 0;
  for (int64_t first = 0; first < push.rows; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const int label = row < push.rows ? push.labels[row * push.labels_stride] : -1;
    arrivals += __syncthreads_count(label == k);
    if (k == 0) rejected += __syncthreads_count(label >= push.classes);
  }
  if (threadIdx.x == 0 && rejected > 0) atomicAdd(push.rejected, rejected);
  return arrivals;
}

// One block per class, two passes over the labels. The first only counts: which rows stay, the last `slots` of the push,
// depends on how many there are. The second numbers them, writes their ids and copies them; the barriers in
// `number_chosen` also keep `rows` until every thread has copied.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) ring_push_kernel(const RingPush push) {
  __shared__ int warp_counts[kThreads / kWarp];
  __shared__ int rows[kThreads];  // those of this class among the rows at hand, in order

  const int k = blockIdx.x;
  const int arrivals = count_arrivals(push, k);
  if (arrivals == 0) return;
  const int cursor = push.cursor[k * push.cursor_stride];
  const int team = team_size(push.units);
  Unit* const bank = reinterpret_cast<Unit*>(push.bank) + k * push.bank_class_stride;
  const Unit* const contexts = reinterpret_cast<const Unit*>(push.contexts);

  int seen = 0;  // rows of this class before the rows at hand
  for (int64_t first = 0; first < push.rows; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const bool mine = row < push.rows && push.labels[row * push.labels_stride] == k;
    int rank;
    const int found = number_chosen(mine, rank, warp_counts);
    if (mine) {
      rows[rank] = static_cast<int>(row);
      if (stays(seen + rank, arrivals, push.slots)) {
        const int64_t slot = slot_of(cursor, seen + rank, push.slots);
        push.ids[k * push.ids_class_stride + slot * push.ids_slot_stride] =
            push.context_ids[row * push.context_ids_stride];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x / team; i < found; i += kThreads / team) {
      if (!stays(seen + i, arrivals, push.slots)) continue;
      const int64_t slot = slot_of(cursor, seen + i, push.slots);
      copy_row(push, bank + slot * push.bank_slot_stride, contexts + rows[i] * push.context_row_stride,
               threadIdx.x % team, team);
    }
    seen += found;
  }

  if (threadIdx.x == 0) {
    int32_t& count = push.counts[k * push.counts_stride];
    count = next_count(count, arrivals, push.slots);
    push.cursor[k * push.cursor_stride] = next_cursor(cursor, arrivals, push.slots);
  }
}

using Kernel = void (*)(RingPush);

Kernel kernel_for(int unit) {
  switch (unit) {
    case 16:
      return ring_push_kernel<uint4>;
    case 8:
      return ring_push_kernel<uint2>;
    case 4:
      return ring_push_kernel<uint32_t>;
    case 2:
      return ring_push_kernel<uint16_t>;
    default:
      return ring_push_kernel<uint8_t>;
  }
}

}  // namespace

void launch_ring_push(const RingPush& push, void* stream) {
  kernel_for(push.unit)<<<push.classes, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(push);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("ring_push_: the launch failed: ") + cudaGetErrorString(error));
  }
}

int cuda_toolkit() { return CUDART_VERSION; }

}  // namespace mcic
