// The native engine: runs the op graph of a packed file. It knows neither Python nor torch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace lowbit {

enum class Type { f32, i32, u8, u64 };

// A tensor of the packed file: C-contiguous, borrowed while the engine is built.
struct Tensor {
  Type type;
  std::vector<int64_t> shape;
  const void* data;
};

// One op as docs/contract.md describes it. Attributes that an op does not have keep their defaults.
struct OpSpec {
  std::string op;
  std::vector<int64_t> inputs;
  std::array<int64_t, 2> kernel{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1, channels = 0, bits = 0;
  int64_t input_multiplier = 0, input_offset = 0, weight_width = 0, weight_multiplier = 0, weight_offset = 0;
  bool count_include_pad = false;
  double min = 0, max = 0;
  std::map<std::string, Tensor> tensors;
};

// What one image's value looks like, channels last. Codes of 1 bit are stored as 64-bit words, LSB first, a whole
// number of words to a pixel; codes of 2 to 8 bits as a byte each; bits 0 means float32.
struct Shape {
  int64_t height, width, channels;
  int bits = 0;

  bool is_float() const { return bits == 0; }
  int64_t pixels() const { return height * width; }
  int64_t elements() const { return pixels() * channels; }
  int64_t words() const { return (channels + 63) / 64; }
  int64_t pixel_bytes() const { return bits == 0 ? channels * 4 : bits == 1 ? words() * 8 : channels; }
  int64_t bytes() const { return pixels() * pixel_bytes(); }
  bool operator==(const Shape&) const = default;
};

inline constexpr int64_t kStripBytes = 1 << 18;  // with what is made of them, they stay in the L2 cache

// A network ready to run. Safe to call from several threads: calls to one engine wait for each other.
class Engine {
 public:
  // Checks all that memory safety rests on, repacks the weights and plans the memory.
  // Throws std::invalid_argument when the graph or a tensor is malformed, or when `isa` (empty: the best) is not
  // available. Where `tune`, ops that have several ways to compute the same take the one that is faster in a short run.
  // Of a value that only pools read, no more than about `strip_bytes` is made at a time.
  Engine(Shape input, const std::vector<OpSpec>& ops, int threads, std::string_view isa, bool tune = true,
         int64_t strip_bytes = kStripBytes);
  ~Engine();

  // Float32 images (batch, C, H, W) to outputs (batch, C, H, W). `seconds`, when given, gets the time of each op added,
  // in which all threads work on it; else they take images of their own where there are enough. Returns false if a
  // number of the images is not finite; the outputs mean nothing then.
  bool run(const float* images, int64_t batch, float* outputs, double* seconds = nullptr);

  // Runs op `index` alone. Values are (batch, H, W, C): floats, or codes as a byte each, which must be below 2^bits.
  void run_op(size_t index, const std::vector<const void*>& inputs, int64_t batch, void* output);

  // To be called in the child of a fork, before anything else is: from then on the engine runs on one thread.
  void after_fork();

  size_t op_count() const;
  const std::vector<size_t>& op_inputs(size_t index) const;
  std::string_view op_kernel(size_t index) const;  // the entry of the kernel table that it calls, or empty
  const Shape& value(size_t number) const;         // 0 is the input, i + 1 is what op i writes
  std::string_view isa() const;
  int threads() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The instruction sets of this build, and those of them that this CPU runs, which are the names that `isa` may take.
// The best first.
std::vector<std::string> built_isas();
std::vector<std::string> available_isas();

// Multiply-accumulates a second that one core reaches at most with the instruction set `isa`, measured now, in a few
// milliseconds: `kind` is "float", "integer" (of up to 8 bits) or "binary".
// Throws std::invalid_argument when either is unknown or the CPU lacks it.
double peak(std::string_view kind, std::string_view isa);

}  // namespace lowbit
