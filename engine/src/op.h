// What every op is to the engine, and the checks that ops share.
#pragma once

#include <initializer_list>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>

#include "kernels/kernels.h"
#include "lowbit/engine.h"
#include "threads.h"

namespace lowbit {

inline constexpr size_t kAlignment = 64;  // a cache line, and the widest vector

inline int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t number, int64_t divisor) { return (number + divisor - 1) / divisor; }
inline int64_t floor_div(int64_t number, int64_t divisor) {
  return number < 0 ? -ceil_div(-number, divisor) : number / divisor;
}

// Memory aligned to 64 bytes. What is at least a huge page large is aligned to one, and the system is asked for them:
// weights then stream by without a page to be looked up every few lines.
void* take_memory(size_t bytes);
void give_back(void* data, size_t bytes);

template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t n) {
    if (n > SIZE_MAX / sizeof(T)) throw std::bad_alloc();
    return static_cast<T*>(take_memory(n * sizeof(T)));
  }
  void deallocate(T* data, size_t n) { give_back(data, n * sizeof(T)); }
  bool operator==(const AlignedAllocator&) const = default;
};

template <class T>
using Buffer = std::vector<T, AlignedAllocator<T>>;

// What an op reads and writes.
struct Operands {
  std::array<const void*, 2> inputs;
  void* output;

  template <class T>
  const T* input(int number = 0) const {
    return static_cast<const T*>(inputs[number]);
  }
  template <class T>
  T* result() const {
    return static_cast<T*>(output);
  }
};

class Measure;

// Some channels of some pixels, which are numbered through the batch. `channel` is a multiple of 64, `end` another or
// the number of channels.
struct Part {
  int64_t first, count, channel, end;
};

class PixelwiseOp;

// An op that works on each part of a value as soon as that part is written.
struct Follower {
  const PixelwiseOp* op;
  Operands operands;
};

// Rows of one image's output that a run makes, and the rows of its input and output with which their memory begins.
struct Strip {
  int64_t first, end, input_first, output_first;
};

// Pixels of an output that a run makes, numbered through the batch, and where in memory the first of them lies.
struct Span {
  int64_t first, count, place;
};

// One run of one op on a batch.
struct Call : Operands {
  void* scratch;              // batch * Op::scratch_bytes()
  std::byte* thread_scratch;  // thread_bytes for each thread
  size_t thread_bytes;
  int64_t batch;
  ThreadPool& pool;
  std::span<const Follower> followers = {};
  const Strip* strip = nullptr;  // of an image, for a batch of 1; all rows of all images where there is none

  // Whether the op has yet to prepare its input in the scratch memory.
  bool begins() const { return strip == nullptr || strip->first == 0; }

  Span span(int64_t height, int64_t width) const {
    if (strip == nullptr) return {0, batch * height * width, 0};
    return {strip->first * width, (strip->end - strip->first) * width, (strip->first - strip->output_first) * width};
  }

  // An op that writes floats says of each part that it is there.
  void done(const Part& part) const;
};

class Op {
 public:
  explicit Op(Shape output) : output_(output) {}
  virtual ~Op() = default;

  const Shape& output() const { return output_; }
  virtual int64_t scratch_bytes() const { return 0; }         // per image
  virtual int64_t thread_scratch_bytes() const { return 0; }  // per thread
  // The entry of the kernel table that it calls, if any.
  virtual const char* kernel(bool /*joined*/) const { return ""; }
  virtual void run(const Call& call) const = 0;

  // Chooses between ways to compute the same, by their times on this machine.
  virtual void tune(const Measure&) {}

  // Whether it can make its output strip by strip, in order, from an input that is there as a whole.
  virtual bool makes_strips() const { return false; }

  // Whether this op can write what `next` makes of its output, at once, without that output being anywhere. What else
  // `next` reads is the second input of the call.
  virtual bool joins(const PixelwiseOp&) const { return false; }
  virtual void run_joined(const PixelwiseOp&, const Call&) const {}

 private:
  Shape output_;
};

// An op whose output at a pixel and channel is made of its inputs at the same pixel, and at the same channel if they
// have as many. It may write where it reads.
class PixelwiseOp : public Op {
 public:
  using Op::Op;
  virtual void apply(const Operands& operands, const Part& part) const = 0;

  virtual bool is_sum() const { return false; }  // of its two inputs, nothing else

  void run(const Call& call) const final {
    const int64_t width = output().width, channels = output().channels;
    call.pool.run(static_cast<size_t>(call.batch * output().height), [&](size_t row, int) {
      const Part part{static_cast<int64_t>(row) * width, width, 0, channels};
      apply(call, part);
      call.done(part);
    });
  }
};

inline void Call::done(const Part& part) const {
  for (const Follower& follower : followers) follower.op->apply(follower.operands, part);
}

using Inputs = std::span<const Shape>;

std::unique_ptr<Op> make_conv2d(const OpSpec&, const Shape& input, const Kernels&);
std::unique_ptr<Op> make_table_conv2d(const OpSpec&, const Shape& input, const Kernels&);
std::unique_ptr<Op> make_binary_conv2d(const OpSpec&, const Shape& input, const Kernels&);
std::unique_ptr<Op> make_quant_conv2d(const OpSpec&, const Shape& input, const Kernels&);
std::unique_ptr<Op> make_threshold(const OpSpec&, const Shape& input, const Kernels&);
std::unique_ptr<Op> make_pool(const OpSpec&, const Shape& input, const Kernels&);
std::unique_ptr<Op> make_abs_mean(const OpSpec&, const Shape& input);
std::unique_ptr<Op> make_multiply(const OpSpec&, Inputs inputs);
std::unique_ptr<Op> make_elementwise(const OpSpec&, Inputs inputs, const Kernels&);

// --- checks; each throws std::invalid_argument -----------------------------------------------------------------------

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline constexpr int64_t kMaxExtent = 1 << 16;
inline constexpr int64_t kMaxElements = 1 << 24;
inline constexpr int64_t kMaxTaps = 1 << 20;  // products in one sum

// A sliding window: its geometry, and the size of what it writes.
struct Window {
  std::array<int64_t, 2> kernel, stride, padding, dilation;
  int64_t height, width;  // of the output

  Window(const OpSpec& spec, const Shape& input);
};

// An op that slides a window of no dilation over each channel. Its input may be there as a strip.
class PoolOp : public Op {
 public:
  PoolOp(const Window& window, const Shape& input)
      : Op({window.height, window.width, input.channels, input.bits}), window(window), input_(input) {}

  // Rows of the output for which the first `rows` of the input are enough.
  int64_t rows_from(int64_t rows) const;
  // Rows of the input that no row of the output needs from `row` on.
  int64_t rows_before(int64_t row) const;

  const Window window;

 protected:
  const Shape input_;
};

// The tensor `name` of exactly this type and shape.
const void* tensor_data(const OpSpec& spec, const char* name, Type type, std::initializer_list<int64_t> shape);

inline bool has_tensor(const OpSpec& spec, const char* name) { return spec.tensors.count(name) != 0; }

// The first extent of the tensor `name`; 0 where there is none.
inline int64_t rows(const OpSpec& spec, const char* name) {
  const auto found = spec.tensors.find(name);
  return found == spec.tensors.end() || found->second.shape.empty() ? 0 : found->second.shape[0];
}

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr Type type = Type::f32;
};
template <>
struct TypeOf<int32_t> {
  static constexpr Type type = Type::i32;
};
template <>
struct TypeOf<uint8_t> {
  static constexpr Type type = Type::u8;
};
template <>
struct TypeOf<uint64_t> {
  static constexpr Type type = Type::u64;
};

// A copy-free view of the tensor `name`, checked.
template <class T>
std::span<const T> tensor(const OpSpec& spec, const char* name, std::initializer_list<int64_t> shape) {
  size_t elements = 1;
  for (const int64_t extent : shape) elements *= static_cast<size_t>(extent);
  return {static_cast<const T*>(tensor_data(spec, name, TypeOf<T>::type, shape)), elements};
}

// The bias of each channel. A missing one is -0, which leaves every float as it is.
inline std::vector<float> bias_of(const OpSpec& spec, int64_t channels) {
  if (!has_tensor(spec, "bias")) return std::vector<float>(channels, -0.0f);
  const auto bias = tensor<float>(spec, "bias", {channels});
  return {bias.begin(), bias.end()};
}

}  // namespace lowbit
