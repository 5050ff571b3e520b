#include "op.h"

#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lowbit {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

std::align_val_t alignment_of(size_t bytes) { return std::align_val_t(bytes < kHugePage ? kAlignment : kHugePage); }

}  // namespace

void* take_memory(size_t bytes) {
  void* data = ::operator new(bytes, alignment_of(bytes));
#ifdef __linux__
  if (bytes >= kHugePage) (void)madvise(data, bytes, MADV_HUGEPAGE);  // refused, it is memory all the same
#endif
  return data;
}

void give_back(void* data, size_t bytes) { ::operator delete(data, alignment_of(bytes)); }

Window::Window(const OpSpec& spec, const Shape& input)
    : kernel(spec.kernel), stride(spec.stride), padding(spec.padding), dilation(spec.dilation) {
  const std::array<int64_t, 2> extents{input.height, input.width};
  std::array<int64_t, 2> outputs{};
  for (int axis = 0; axis < 2; ++axis) {
    for (const auto& [values, low] : {std::pair{&kernel, 1}, {&stride, 1}, {&padding, 0}, {&dilation, 1}})
      require((*values)[axis] >= low && (*values)[axis] <= kMaxExtent, "a window attribute is out of range");
    const int64_t room = extents[axis] + 2 * padding[axis] - (dilation[axis] * (kernel[axis] - 1) + 1);
    require(room >= 0, "the window does not fit into its input");
    outputs[axis] = room / stride[axis] + 1;
  }
  const int64_t padded = (extents[0] + 2 * padding[0]) * (extents[1] + 2 * padding[1]);
  require(padded <= kMaxElements && padded * input.channels <= kMaxElements, "the padded input is too large");
  height = outputs[0];
  width = outputs[1];
}

int64_t PoolOp::rows_from(int64_t rows) const {
  if (rows == input_.height) return window.height;
  const int64_t room = rows + window.padding[0] - window.kernel[0];
  return room < 0 ? 0 : room / window.stride[0] + 1;
}

int64_t PoolOp::rows_before(int64_t row) const {
  return row == window.height ? input_.height : std::max<int64_t>(row * window.stride[0] - window.padding[0], 0);
}

const void* tensor_data(const OpSpec& spec, const char* name, Type type, std::initializer_list<int64_t> shape) {
  const auto found = spec.tensors.find(name);
  if (found == spec.tensors.end()) throw std::invalid_argument("the tensor '" + std::string(name) + "' is missing");
  const Tensor& tensor = found->second;
  if (tensor.type != type || !std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end()))
    throw std::invalid_argument("the tensor '" + std::string(name) + "' has the wrong type or shape");
  return tensor.data;
}

}  // namespace lowbit
