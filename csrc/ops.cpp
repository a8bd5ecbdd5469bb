// Schema of the native operations, the checks of their arguments, and the Python module `_C` with the build's facts.
#include <pybind11/pybind11.h>

// One build serves PyTorch 2.10 and newer. Defined here and not by the build: PyTorch's copy of pybind11 wants to come
// before it.
#define TORCH_TARGET_VERSION ((2ULL << 56) | (10ULL << 48))
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ring_push.h"

#ifdef MCIC_CUDA
// In libtorch_cuda; null where this was linked without it, against the CPU build of PyTorch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mcic {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "[]" : "]");
  return text.str();
}

std::string device_text(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "the CPU";
}

void check(const char* name, const Tensor& tensor, const Tensor& bank, ScalarType dtype, Shape shape) {
  const auto sizes = tensor.sizes();
  const bool fits = sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
  if (fits && tensor.scalar_type() == dtype && tensor.device() == bank.device()) return;
  std::ostringstream text;
  text << "ring_push_: " << name << " must be " << torch::headeronly::toString(dtype) << ' ' << shape_text(shape)
       << " on " << device_text(bank) << ", got " << torch::headeronly::toString(tensor.scalar_type()) << ' '
       << shape_text(sizes) << " on " << device_text(tensor);
  throw std::invalid_argument(text.str());
}

// The widest piece in which every row of both tensors can be moved.
int32_t unit_of(const Tensor& bank, const Tensor& contexts) {
  const auto element = static_cast<int64_t>(bank.element_size());
  if (bank.stride(2) != 1 || contexts.stride(1) != 1) return static_cast<int32_t>(element);
  const auto places = reinterpret_cast<uint64_t>(bank.data_ptr()) | reinterpret_cast<uint64_t>(contexts.data_ptr());
  const auto steps = bank.stride(0) | bank.stride(1) | contexts.stride(0) | bank.size(2);
  int64_t unit = 16;
  while (unit > element && (places % unit != 0 || steps * element % unit != 0)) unit /= 2;
  return static_cast<int32_t>(unit);
}

// All arguments checked but the values of the labels.
RingPush checked(const Tensor& bank, const Tensor& ids, const Tensor& counts, const Tensor& cursor,
                 const Tensor& rejected, const Tensor& contexts, const Tensor& labels, const Tensor& context_ids) {
  if (bank.dim() != 3) throw std::invalid_argument("ring_push_: bank must be [K, S, D], got " + shape_text(bank.sizes()));
  if (contexts.dim() != 2) {
    throw std::invalid_argument("ring_push_: contexts must be [R, D], got " + shape_text(contexts.sizes()));
  }
  const int64_t classes = bank.size(0), slots = bank.size(1), channels = bank.size(2), rows = contexts.size(0);
  if (std::max({classes, slots, rows}) > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("ring_push_: more than 2^31 - 1 classes, slots or rows");
  }
  check("ids", ids, bank, ScalarType::Long, {classes, slots});
  check("counts", counts, bank, ScalarType::Int, {classes});
  check("cursor", cursor, bank, ScalarType::Int, {classes});
  check("rejected", rejected, bank, ScalarType::Int, {});
  check("contexts", contexts, bank, bank.scalar_type(), {rows, channels});
  check("labels", labels, bank, ScalarType::Int, {rows});
  check("context_ids", context_ids, bank, ScalarType::Long, {rows});

  const int32_t unit = unit_of(bank, contexts);
  const auto element = static_cast<int64_t>(bank.element_size());
  const auto in_units = [&](int64_t elements) { return elements * element / unit; };
  const bool single = unit > element;  // then a row is one stretch of memory
  RingPush push{};
  push.bank = static_cast<char*>(bank.mutable_data_ptr());
  push.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  push.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  push.cursor = static_cast<int32_t*>(cursor.mutable_data_ptr());
  push.rejected = static_cast<int32_t*>(rejected.mutable_data_ptr());
  push.contexts = static_cast<const char*>(contexts.const_data_ptr());
  push.labels = static_cast<const int32_t*>(labels.const_data_ptr());
  push.context_ids = static_cast<const int64_t*>(context_ids.const_data_ptr());
  push.classes = static_cast<int32_t>(classes);
  push.slots = static_cast<int32_t>(slots);
  push.rows = static_cast<int32_t>(rows);
  push.unit = unit;
  push.units = in_units(channels);
  push.bank_class_stride = in_units(bank.stride(0));
  push.bank_slot_stride = in_units(bank.stride(1));
  push.bank_unit_stride = single ? 1 : bank.stride(2);
  push.ids_class_stride = ids.stride(0);
  push.ids_slot_stride = ids.stride(1);
  push.counts_stride = counts.stride(0);
  push.cursor_stride = cursor.stride(0);
  push.context_row_stride = in_units(contexts.stride(0));
  push.context_unit_stride = single ? 1 : contexts.stride(1);
  push.labels_stride = labels.stride(0);
  push.context_ids_stride = context_ids.stride(0);
  return push;
}

bool is_empty(const RingPush& push) { return push.rows == 0 || push.classes == 0 || push.slots == 0; }

void ring_push_on_cpu(Tensor bank, Tensor ids, Tensor counts, Tensor cursor, Tensor rejected, Tensor contexts,
                      Tensor labels, Tensor context_ids) {
  const RingPush push = checked(bank, ids, counts, cursor, rejected, contexts, labels, context_ids);
  if (!is_empty(push)) ring_push_cpu(push);
}

#ifdef MCIC_CUDA
void ring_push_on_cuda(Tensor bank, Tensor ids, Tensor counts, Tensor cursor, Tensor rejected, Tensor contexts,
                       Tensor labels, Tensor context_ids) {
  const RingPush push = checked(bank, ids, counts, cursor, rejected, contexts, labels, context_ids);
  if (is_empty(push)) return;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("ring_push_: this was built with a CPU build of PyTorch; install again with the present one");
  }
  const int32_t device = bank.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch_ring_push(push, stream);
}
#endif

}  // namespace
}  // namespace mcic

STABLE_TORCH_LIBRARY_FRAGMENT(mcic, library) {
  library.def(
      "ring_push_(Tensor(a!) bank, Tensor(b!) ids, Tensor(c!) counts, Tensor(d!) cursor, Tensor(e!) rejected, "
      "Tensor contexts, Tensor labels, Tensor context_ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mcic, CPU, library) { library.impl("ring_push_", TORCH_BOX(&mcic::ring_push_on_cpu)); }

#ifdef MCIC_CUDA
STABLE_TORCH_LIBRARY_IMPL(mcic, CUDA, library) { library.impl("ring_push_", TORCH_BOX(&mcic::ring_push_on_cuda)); }
#endif

#ifdef __clang__
#define MCIC_COMPILER "clang " __clang_version__
#else
#define MCIC_COMPILER "gcc " __VERSION__
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The native operations of MCIC. Importing it registers torch.ops.mcic.ring_push_.";
  module.attr("version") = MCIC_VERSION;
  module.attr("torch") = TORCH_VERSION;
  module.attr("compiler") = MCIC_COMPILER;
#ifdef MCIC_CUDA
  const int toolkit = mcic::cuda_toolkit();
  module.attr("cuda") = std::to_string(toolkit / 1000) + "." + std::to_string(toolkit % 1000 / 10);
  module.attr("architectures") = MCIC_CUDA;
#else
  module.attr("cuda") = pybind11::none();
  module.attr("architectures") = pybind11::none();
#endif
}
