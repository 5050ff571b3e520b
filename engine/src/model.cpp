// The engine: builds the ops, and runs them as planned.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>

#include "float_mode.h"
#include "kernels/select.h"
#include "lowbit/engine.h"
#include "measure.h"
#include "op.h"
#include "plan.h"

namespace lowbit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kMaxOps = 1 << 12;
constexpr int64_t kMaxAllElements = 1 << 27;
constexpr double kMaxWork = 1ll << 38;       // products of one image, over all ops
constexpr double kMaxWeightBytes = 1 << 30;  // of all ops, as they are laid out, tables of channels included
constexpr double kPoolWork = 1 << 8;         // products that an element under a window without weights counts as
constexpr int kMaxThreads = 256;
constexpr int64_t kMostApartBytes = 1 << 28;  // of images that threads take for themselves, each with its own memory
constexpr int64_t kChunkBytes = 1 << 20;      // images run together as long as their values fit each thread's L2 cache
constexpr int64_t kMaxChunk = 64;
constexpr int64_t kEnoughImages = 4;  // for a thread, so that it matters little if one has an image more to do

std::unique_ptr<Op> make_op(const OpSpec& spec, Inputs inputs, const Kernels& kernels) {
  require(inputs.size() == (spec.op == "add" || spec.op == "multiply" ? 2 : 1),
          "the op has the wrong number of inputs");
  if (spec.op == "conv2d") return make_conv2d(spec, inputs[0], kernels);
  if (spec.op == "table_conv2d") return make_table_conv2d(spec, inputs[0], kernels);
  if (spec.op == "binary_conv2d") return make_binary_conv2d(spec, inputs[0], kernels);
  if (spec.op == "quant_conv2d") return make_quant_conv2d(spec, inputs[0], kernels);
  if (spec.op == "threshold") return make_threshold(spec, inputs[0], kernels);
  if (spec.op == "max_pool" || spec.op == "avg_pool") return make_pool(spec, inputs[0], kernels);
  if (spec.op == "abs_mean") return make_abs_mean(spec, inputs[0]);
  if (spec.op == "multiply") return make_multiply(spec, inputs);
  if (spec.op == "affine" || spec.op == "relu" || spec.op == "hardtanh" || spec.op == "prelu" || spec.op == "add")
    return make_elementwise(spec, inputs, kernels);
  throw std::invalid_argument("the op is unknown");
}

// What kMaxWork limits. In floating point, for nothing has checked the attributes that an op ignores.
double work_of(const OpSpec& spec, const Shape& input, const Shape& output) {
  const double taps = static_cast<double>(spec.kernel[0]) * static_cast<double>(spec.kernel[1]);
  const bool weighted = spec.op.ends_with("conv2d");
  return taps * static_cast<double>(output.elements()) *
         (weighted ? static_cast<double>(input.channels / spec.groups) : kPoolWork);
}

// What kMaxWeightBytes limits: a group's weights, and its tables of two numbers, of thresholds and of border cases, go
// on to a multiple of 16 channels, a pixel's bits to words, so that a small file of many groups may grow.
double weight_bytes_of(const OpSpec& spec, const Shape& input) {
  if (!spec.op.ends_with("conv2d")) return 0;
  const Window window(spec, input);
  const double taps = static_cast<double>(window.kernel[0] * window.kernel[1]);
  // Border cases along an axis, at most: one for each output, and one for each number of taps that either end hides.
  const double cases = static_cast<double>(std::min(window.height, 2 * window.kernel[0] + 2) *
                                           std::min(window.width, 2 * window.kernel[1] + 2));
  const int64_t groups = std::clamp<int64_t>(spec.groups, 1, kMaxExtent), depth = ceil_div(input.channels, groups);
  const int64_t bytes = spec.op == "binary_conv2d" ? 8 * ceil_div(depth, 64) : 4 * depth;
  const int64_t channels = round_up(ceil_div(std::clamp<int64_t>(spec.channels, 0, kMaxExtent), groups), kTileChannels);
  const int64_t levels = has_tensor(spec, "thresholds") ? (1 << std::clamp<int64_t>(spec.bits, 0, 8)) - 1 : 0;
  return static_cast<double>(groups * channels) *
         (taps * static_cast<double>(bytes) + 4 * (2 + cases + static_cast<double>(levels)));
}

// Images that run together: their part of the arena, and the threads that share each op's work.
struct Lane {
  std::byte* arena;
  int64_t batch;
  ThreadPool& pool;
  std::byte* thread_scratch;
  std::vector<Follower>& followers;

  std::byte* at(const Block& block) const { return arena + block.offset * batch; }
};

void to_channels_first(const float* pixels, const Shape& shape, float* planes) {
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t i = 0; i < shape.pixels(); ++i) *planes++ = pixels[i * shape.channels + c];
}

void pack_bits(const uint8_t* codes, const Shape& shape, int64_t pixels, uint64_t* words) {
  for (int64_t p = 0; p < pixels; ++p, codes += shape.channels, words += shape.words()) {
    std::fill_n(words, shape.words(), 0);
    for (int64_t c = 0; c < shape.channels; ++c) words[c / 64] |= static_cast<uint64_t>(codes[c]) << c % 64;
  }
}

void unpack_bits(const uint64_t* words, const Shape& shape, int64_t pixels, uint8_t* codes) {
  for (int64_t p = 0; p < pixels; ++p, words += shape.words())
    for (int64_t c = 0; c < shape.channels; ++c) *codes++ = words[c / 64] >> c % 64 & 1;
}

}  // namespace

struct Engine::State {
  State(int threads, std::string_view isa)
      : kernels(select_kernels(isa)),
        pool(std::make_unique<ThreadPool>(threads)),
        mutex(std::make_unique<std::mutex>()) {}

  bool run(const Lane& lane, const float* images, float* outputs, double* seconds);
  void run_group(const Lane& lane, const Group& group, Call& call) const;
  void run_strips(const Lane& lane, const Group& group, Call call, double* seconds) const;
  int64_t run_pool(const Lane& lane, size_t op, int64_t image, int64_t done, int64_t kept, int64_t end) const;

  std::byte* value(const Lane& lane, size_t number) const { return lane.at(plan.block(number)); }
  Operands operands(const Lane& lane, size_t op) const {
    Operands result{{}, value(lane, op + 1)};
    for (size_t k = 0; k < inputs[op].size(); ++k) result.inputs[k] = value(lane, inputs[op][k]);
    return result;
  }

  const Kernels& kernels;
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<std::mutex> mutex;
  std::vector<Shape> shapes;  // of values
  std::vector<std::vector<size_t>> inputs;
  std::vector<std::unique_ptr<Op>> ops;
  Plan plan;
  Buffer<std::byte> arena, thread_scratch;
  ThreadPool alone{1};
  std::vector<std::vector<Follower>> followers;  // of the group that runs in each lane
};

Engine::Engine(Shape input, const std::vector<OpSpec>& specs, int threads, std::string_view isa, bool tune,
               int64_t strip_bytes) {
  require(threads >= 1 && threads <= kMaxThreads, "threads must be 1 to 256");
  require(!specs.empty() && specs.size() <= kMaxOps, "the graph must have 1 to 4096 ops");
  for (const int64_t extent : {input.height, input.width, input.channels})
    require(extent >= 1 && extent <= kMaxExtent, "the input shape is out of range");
  require(input.pixels() <= kMaxElements && input.elements() <= kMaxElements && input.is_float(),
          "the input is too large");
  const DefaultFloatMode mode;  // thresholds become lines that hold in no other
  state_ = std::make_unique<State>(threads, isa);
  State& s = *state_;
  s.shapes.push_back(input);
  int64_t elements = input.elements();
  double work = 0, weight_bytes = 0;
  for (size_t i = 0; i < specs.size(); ++i) {
    try {
      std::vector<Shape> shapes;
      for (const int64_t number : specs[i].inputs) {
        require(number >= 0 && static_cast<size_t>(number) <= i, "an input is no value of an earlier op");
        shapes.push_back(s.shapes[number]);
      }
      if (!shapes.empty()) weight_bytes += weight_bytes_of(specs[i], shapes[0]);
      require(weight_bytes <= kMaxWeightBytes, "the weights take too much memory");
      s.ops.push_back(make_op(specs[i], shapes, s.kernels));
      s.inputs.emplace_back(specs[i].inputs.begin(), specs[i].inputs.end());
      s.shapes.push_back(s.ops.back()->output());
      elements += s.shapes.back().elements();
      require(s.shapes.back().elements() <= kMaxElements && elements <= kMaxAllElements, "the values are too large");
      work += work_of(specs[i], shapes[0], s.shapes.back());
      require(work <= kMaxWork, "an image takes too many products");
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("op " + std::to_string(i) + " (" + specs[i].op + "): " + error.what());
    }
  }
  require(s.shapes.back().is_float(), "the output must be float32");

  s.plan = Plan(s.shapes, s.inputs, s.ops, strip_bytes);
  s.arena.resize(s.plan.image_bytes);
  s.thread_scratch.resize(s.plan.thread_bytes * s.pool->size());
  s.followers.resize(s.pool->size());
  for (auto& followers : s.followers)  // now, for the work of a pool must not throw
    for (const Group& group : s.plan.groups) followers.reserve(group.followers.size());
  if (tune)
    for (const auto& op : s.ops) op->tune(Measure(s.kernels.isa, *s.pool));
}

Engine::~Engine() = default;

bool Engine::State::run(const Lane& lane, const float* images, float* outputs, double* seconds) {
  const Shape &in = shapes.front(), &out = shapes.back();
  auto* pixels = reinterpret_cast<float*>(value(lane, 0));
  std::atomic<bool> finite = true;
  lane.pool.run(static_cast<size_t>(lane.batch), [&](size_t n, int) {
    const int64_t first = static_cast<int64_t>(n) * in.elements();
    if (!kernels.rows->interleave(images + first, in.pixels(), in.channels, pixels + first)) finite = false;
  });
  if (!finite) return false;
  for (size_t number = 0; number < plan.groups.size(); ++number) {
    const auto start = Clock::now();
    const Group& group = plan.groups[number];
    lane.followers.clear();
    for (const size_t i : group.followers) lane.followers.push_back({plan.pixelwise(i), operands(lane, i)});
    Call call{operands(lane, group.head),
              lane.at(plan.scratch[number]),
              lane.thread_scratch,
              plan.thread_bytes,
              lane.batch,
              lane.pool};
    if (group.strip_rows > 0)
      run_strips(lane, group, call, seconds);
    else
      run_group(lane, group, call);
    if (seconds != nullptr) seconds[group.head] += std::chrono::duration<double>(Clock::now() - start).count();
  }
  const auto* results = reinterpret_cast<const float*>(value(lane, ops.size()));
  for (int64_t n = 0; n < lane.batch; ++n)
    to_channels_first(results + n * out.elements(), out, outputs + n * out.elements());
  return true;
}

void Engine::State::run_group(const Lane& lane, const Group& group, Call& call) const {
  const Op& head = *ops[group.head];
  if (group.joined) {
    const Follower& next = lane.followers[0];
    const std::vector<size_t>& read = inputs[group.followers[0]];
    if (read.size() > 1) call.inputs[1] = next.operands.inputs[read[0] == group.head + 1 ? 1 : 0];
    call.output = next.operands.output;
    call.followers = std::span(lane.followers).subspan(1);
    head.run_joined(*next.op, call);
  } else {
    call.followers = lane.followers;
    head.run(call);
  }
}

// What a pool can do with rows kept..end of an image. Returns the first row that it still needs.
int64_t Engine::State::run_pool(const Lane& lane, size_t op, int64_t image, int64_t done, int64_t kept,
                                int64_t end) const {
  const auto& pool = dynamic_cast<const PoolOp&>(*ops[op]);
  const Strip strip{pool.rows_from(done), pool.rows_from(end), kept, 0};
  Operands pooled = operands(lane, op);
  pooled.output = static_cast<std::byte*>(pooled.output) + image * pool.output().bytes();
  pool.run({pooled, nullptr, lane.thread_scratch, plan.thread_bytes, 1, lane.pool, {}, &strip});
  return pool.rows_before(strip.end);
}

// Image by image. Rows that a pool still needs when a strip is done move to the beginning of the memory.
void Engine::State::run_strips(const Lane& lane, const Group& group, Call call, double* seconds) const {
  const Shape &input = shapes[inputs[group.head][0]], &made = shapes[group.head + 1];
  const auto* images = call.input<std::byte>();
  call.batch = 1;
  for (int64_t image = 0; image < lane.batch; ++image) {
    call.inputs[0] = images + image * input.bytes();
    int64_t kept = 0;  // the first row in memory
    for (int64_t first = 0; first < made.height;) {
      const int64_t end = std::min(kept + group.strip_rows, made.height);
      const Strip strip{first, end, 0, kept};
      call.strip = &strip;
      run_group(lane, group, call);
      int64_t needed = end;
      for (const size_t i : group.pools) {
        const auto start = Clock::now();
        needed = std::min(needed, run_pool(lane, i, image, first, kept, end));
        if (seconds == nullptr) continue;
        const double time = std::chrono::duration<double>(Clock::now() - start).count();
        seconds[i] += time;
        seconds[group.head] -= time;  // which gets that of the group
      }
      first = end;
      for (const size_t value : group.pooled) {
        std::byte* rows = this->value(lane, value);
        const int64_t row_bytes = shapes[value].width * shapes[value].pixel_bytes();
        std::memmove(rows, rows + (needed - kept) * row_bytes, (end - needed) * row_bytes);
      }
      kept = needed;
    }
  }
}

// Threads take images of their own where there are enough for all, and need not wait for each other then; else, and
// where ops are timed, they share the work of each op.
bool Engine::run(const float* images, int64_t batch, float* outputs, double* seconds) {
  State& s = *state_;
  const std::lock_guard lock(*s.mutex);
  if (batch == 0) return true;
  const DefaultFloatMode mode;
  const int64_t threads = s.pool->size(), in = s.shapes.front().elements(), out = s.shapes.back().elements();
  const bool apart = threads > 1 && seconds == nullptr && s.plan.image_bytes * threads <= kMostApartBytes &&
                     (batch % threads == 0 || batch >= kEnoughImages * threads);
  const int64_t lanes = apart ? threads : 1;
  const int64_t most = std::clamp<int64_t>(kChunkBytes * (threads / lanes) / s.plan.image_bytes, 1, kMaxChunk);
  // A multiple of the lanes, if there are images enough, and of the same size but for one image.
  const int64_t chunks = std::min(batch, round_up(ceil_div(batch, most), lanes));
  const int64_t lane_bytes = s.plan.image_bytes * ceil_div(batch, chunks);
  if (static_cast<int64_t>(s.arena.size()) < lane_bytes * lanes) {
    s.arena = Buffer<std::byte>();  // so that nothing is copied, and the old one is gone
    s.arena.resize(lane_bytes * lanes);
  }
  std::atomic<bool> finite = true;
  const auto run = [&](int64_t number, int thread, ThreadPool& pool) {
    const int64_t first = number * batch / chunks, end = (number + 1) * batch / chunks;
    const Lane lane{s.arena.data() + thread * lane_bytes, end - first, pool,
                    s.thread_scratch.data() + thread * s.plan.thread_bytes, s.followers[thread]};
    if (!s.run(lane, images + first * in, outputs + first * out, seconds)) finite = false;
  };
  if (apart)
    s.pool->run(chunks, [&](size_t number, int thread) { run(number, thread, s.alone); });
  else
    for (int64_t number = 0; number < chunks; ++number) run(number, 0, *s.pool);
  return finite;
}

void Engine::run_op(size_t index, const std::vector<const void*>& inputs, int64_t batch, void* output) {
  State& s = *state_;
  const std::lock_guard lock(*s.mutex);
  const DefaultFloatMode mode;
  const Op& op = *s.ops.at(index);
  require(inputs.size() == s.inputs[index].size(), "the op has another number of inputs");
  std::array<Buffer<uint64_t>, 2> words;
  std::array<const void*, 2> stored{};
  for (size_t k = 0; k < inputs.size(); ++k) {
    const Shape& shape = s.shapes[s.inputs[index][k]];
    stored[k] = inputs[k];
    if (shape.bits == 0) continue;
    const auto* codes = static_cast<const uint8_t*>(inputs[k]);
    require(std::all_of(codes, codes + shape.elements() * batch, [&](uint8_t code) { return code >> shape.bits == 0; }),
            "a code is out of range");
    if (shape.bits != 1) continue;
    words[k].resize(shape.pixels() * shape.words() * batch);
    pack_bits(codes, shape, shape.pixels() * batch, words[k].data());
    stored[k] = words[k].data();
  }
  const Shape& shape = op.output();
  Buffer<uint64_t> packed(shape.bits == 1 ? shape.pixels() * shape.words() * batch : 0);
  Buffer<std::byte> scratch(op.scratch_bytes() * batch);
  op.run({{stored, shape.bits == 1 ? packed.data() : output},
          scratch.data(),
          s.thread_scratch.data(),
          s.plan.thread_bytes,
          batch,
          *s.pool});
  if (shape.bits == 1) unpack_bits(packed.data(), shape, shape.pixels() * batch, static_cast<uint8_t*>(output));
}

void Engine::after_fork() {
  // What the threads of the parent held stays held, and joining them would wait for ever; the arena may have been about
  // to grow. All three are left as they are.
  (void)state_->pool.release();
  (void)state_->mutex.release();
  new (&state_->arena) Buffer<std::byte>();
  state_->pool = std::make_unique<ThreadPool>(1);
  state_->mutex = std::make_unique<std::mutex>();
}

size_t Engine::op_count() const { return state_->ops.size(); }
const std::vector<size_t>& Engine::op_inputs(size_t index) const { return state_->inputs.at(index); }
std::string_view Engine::op_kernel(size_t index) const {
  const Group& group = state_->plan.group_of(index);
  if (group.joined && group.followers[0] == index) return "";
  return state_->ops[index]->kernel(group.joined && group.head == index);
}
const Shape& Engine::value(size_t number) const { return state_->shapes.at(number); }
std::string_view Engine::isa() const { return state_->kernels.isa; }
int Engine::threads() const { return state_->pool->size(); }

}  // namespace lowbit
