// ring_push_ on the CPU: the rows in order, one after the other.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ring_push.h"

namespace mcic {
namespace {

void copy_row(const RingPush& push, char* to, const char* from) {
  if (push.bank_unit_stride == 1 && push.context_unit_stride == 1) {
    std::memcpy(to, from, push.units * push.unit);
    return;
  }
  const int64_t to_step = push.bank_unit_stride * push.unit, from_step = push.context_unit_stride * push.unit;
  for (int64_t i = 0; i < push.units; ++i) std::memcpy(to + i * to_step, from + i * from_step, push.unit);
}

std::vector<int32_t> count_arrivals(const RingPush& push) {
  std::vector<int32_t> arrivals(push.classes);
  for (int64_t row = 0; row < push.rows; ++row) {
    const int32_t label = push.labels[row * push.labels_stride];
    if (label >= push.classes) {
      throw std::invalid_argument("ring_push_: labels must be below the " + std::to_string(push.classes) +
                                  " classes of the bank, got " + std::to_string(label));
    }
    if (label >= 0) ++arrivals[label];
  }
  return arrivals;
}

}  // namespace

void ring_push_cpu(const RingPush& push) {
  const std::vector<int32_t> arrivals = count_arrivals(push);
  std::vector<int32_t> seen(push.classes);
  for (int64_t row = 0; row < push.rows; ++row) {
    const int64_t label = push.labels[row * push.labels_stride];
    if (label < 0) continue;
    const int32_t rank = seen[label]++;
    if (!stays(rank, arrivals[label], push.slots)) continue;
    const int64_t slot = slot_of(push.cursor[label * push.cursor_stride], rank, push.slots);
    const int64_t entry = label * push.bank_class_stride + slot * push.bank_slot_stride;
    copy_row(push, push.bank + entry * push.unit, push.contexts + row * push.context_row_stride * push.unit);
    push.ids[label * push.ids_class_stride + slot * push.ids_slot_stride] =
        push.context_ids[row * push.context_ids_stride];
  }
  for (int64_t k = 0; k < push.classes; ++k) {
    int32_t& count = push.counts[k * push.counts_stride];
    int32_t& cursor = push.cursor[k * push.cursor_stride];
    count = next_count(count, arrivals[k], push.slots);
    cursor = next_cursor(cursor, arrivals[k], push.slots);
  }
}

}  // namespace mcic
