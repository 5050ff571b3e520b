// The engine: builds the ops, plans where their values live, and runs them in order.
#include <algorithm>
#include <chrono>
#include <mutex>
#include <numeric>

#include "kernels/select.h"
#include "lowbit/engine.h"
#include "measure.h"
#include "op.h"

namespace lowbit {
namespace {

constexpr size_t kMaxOps = 1 << 12;
constexpr int64_t kMaxAllElements = 1 << 27;
constexpr double kMaxWork = 1ll << 38;       // products of one image, over all ops
constexpr double kMaxWeightBytes = 1 << 30;  // of all ops, as they are laid out
constexpr double kPoolWork = 1 << 8;         // products that an element under a window without weights counts as
constexpr int kMaxThreads = 256;
constexpr int64_t kChunkBytes = 1 << 20;  // images run together as long as their values fit each thread's L2 cache
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

// What kMaxWeightBytes limits: a group's weights go on to a multiple of 16 channels, a pixel's bits to words, so that a
// small file of many groups may grow.
double weight_bytes_of(const OpSpec& spec, const Shape& input) {
  if (!spec.op.ends_with("conv2d")) return 0;
  const double taps = static_cast<double>(spec.kernel[0]) * static_cast<double>(spec.kernel[1]);
  const int64_t groups = std::clamp<int64_t>(spec.groups, 1, kMaxExtent), depth = ceil_div(input.channels, groups);
  const int64_t bytes = spec.op == "binary_conv2d" ? 8 * ceil_div(depth, 64) : 4 * depth;
  const int64_t channels = round_up(ceil_div(std::clamp<int64_t>(spec.channels, 0, kMaxExtent), groups), kTileChannels);
  return taps * static_cast<double>(groups) * static_cast<double>(channels) * static_cast<double>(bytes);
}

// An op, and pixelwise ops that follow it part by part, in order, while what they read is in the cache.
struct Group {
  size_t head;
  std::vector<size_t> followers;
  bool joined = false;  // the head writes what its one follower makes of its output, and the output itself is nowhere
};

// A block of memory that is in use from group `first` to group `last`, both included; sizes and offsets are per image.
struct Block {
  int64_t bytes, offset;
  size_t first, last;
};

// Images that run together: their part of the arena, and the threads that share each op's work.
struct Lane {
  std::byte* arena;
  int64_t batch;
  ThreadPool& pool;
  std::byte* thread_scratch;
  std::vector<Follower>& followers;

  std::byte* at(const Block& block) const { return arena + block.offset * batch; }
};

// Gives every block the lowest offset at which no block that lives at the same time is in the way. Returns the total.
int64_t place(std::vector<Block*>& blocks) {
  std::stable_sort(blocks.begin(), blocks.end(), [](const Block* a, const Block* b) { return a->bytes > b->bytes; });
  int64_t total = 0;
  std::vector<const Block*> placed;  // by offset
  for (Block* block : blocks) {
    block->offset = 0;
    for (const Block* other : placed) {
      if (other->last < block->first || other->first > block->last) continue;
      if (block->offset + block->bytes <= other->offset) break;
      block->offset = std::max(block->offset, other->offset + other->bytes);
    }
    placed.insert(std::upper_bound(placed.begin(), placed.end(), block,
                                   [](const Block* a, const Block* b) { return a->offset < b->offset; }),
                  block);
    total = std::max(total, block->offset + block->bytes);
  }
  return total;
}

template <class Channels>
void interleave(const float* planes, int64_t size, Channels channels, float* pixels) {
  for (int64_t i = 0; i < size; ++i)
    for (int64_t c = 0; c < channels; ++c) pixels[i * channels + c] = planes[c * size + i];
}

void to_channels_last(const float* planes, const Shape& shape, float* pixels) {
  if (shape.channels == 3)  // of colours, a number that the compiler can use
    interleave(planes, shape.pixels(), std::integral_constant<int64_t, 3>(), pixels);
  else
    interleave(planes, shape.pixels(), shape.channels, pixels);
}

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

  void make_groups();
  void find_homes();
  void plan_memory();

  void run(const Lane& lane, const float* images, float* outputs, double* seconds);

  std::byte* value(const Lane& lane, size_t number) const { return lane.at(values[home[number]]); }
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
  std::vector<const PixelwiseOp*> pixelwise;  // by number; null for others
  std::vector<Group> groups;                  // in the order in which they run
  std::vector<size_t> group_of_op;            // by number
  std::vector<size_t> home;  // the value in whose memory a value lies: its own, or where a follower found it
  std::vector<Block> values;
  std::vector<Block> scratch;  // of groups
  int64_t image_bytes = 0;     // of the arena
  size_t thread_bytes = 0;
  Buffer<std::byte> arena, thread_scratch;
  ThreadPool alone{1};
  std::vector<std::vector<Follower>> followers;  // of the group that runs in each lane
};

// A pixelwise op follows the op, or a follower of the op, that runs last of those whose outputs it reads, if that has
// as many channels: parts are the same to all.
void Engine::State::make_groups() {
  for (size_t i = 0; i < ops.size(); ++i) {
    size_t last = 0;  // the number of groups up to the one that it can follow
    for (const size_t value : inputs[i]) last = std::max(last, value == 0 ? 0 : group_of_op[value - 1] + 1);
    pixelwise.push_back(dynamic_cast<const PixelwiseOp*>(ops[i].get()));
    const bool follows = pixelwise[i] != nullptr && last > 0 &&
                         ops[groups[last - 1].head]->output().channels == ops[i]->output().channels;
    if (follows)
      groups[last - 1].followers.push_back(i);
    else
      groups.push_back({i, {}});
    group_of_op.push_back(follows ? last - 1 : groups.size() - 1);
  }
  for (Group& group : groups) {
    int64_t readers = 0;
    for (const auto& read : inputs) readers += std::count(read.begin(), read.end(), group.head + 1);
    group.joined = group.followers.size() == 1 && readers == 1 && ops[group.head]->joins(*ops[group.followers[0]]);
  }
}

// A follower writes over what it is the last to read, rather than into memory of its own.
void Engine::State::find_homes() {
  home.resize(shapes.size());
  std::iota(home.begin(), home.end(), size_t{0});
  const auto last_reader = [&](size_t value, size_t group, size_t op) {
    for (size_t i = 0; i < ops.size(); ++i) {
      if (std::find(inputs[i].begin(), inputs[i].end(), value) == inputs[i].end()) continue;
      if (group_of_op[i] > group || (group_of_op[i] == group && (i > op || i == groups[group].head))) return false;
    }
    return true;
  };
  for (size_t group = 0; group < groups.size(); ++group)
    for (const size_t i : groups[group].followers) {
      std::vector<size_t> newest = inputs[i];
      std::sort(newest.rbegin(), newest.rend());
      for (const size_t value : newest)
        if (shapes[value] == shapes[i + 1] && last_reader(value, group, i)) {
          home[i + 1] = home[value];
          break;
        }
    }
}

void Engine::State::plan_memory() {
  values.resize(shapes.size(), {0, 0, groups.size(), 0});
  const auto use = [&](size_t value, size_t group) {
    Block& block = values[home[value]];
    block.bytes = round_up(shapes[home[value]].bytes(), kAlignment);
    block.first = std::min(block.first, group);
    block.last = std::max(block.last, group);
  };
  use(0, 0);
  use(ops.size(), groups.size());
  for (size_t i = 0; i < ops.size(); ++i) {
    use(i + 1, group_of_op[i]);
    for (const size_t value : inputs[i]) use(value, group_of_op[i]);
    thread_bytes = std::max<size_t>(thread_bytes, round_up(ops[i]->thread_scratch_bytes(), kAlignment));
  }
  std::vector<Block*> blocks;
  for (size_t group = 0; group < groups.size(); ++group) {
    if (groups[group].joined) values[groups[group].head + 1].bytes = 0;
    scratch.push_back({round_up(ops[groups[group].head]->scratch_bytes(), kAlignment), 0, group, group});
  }
  for (auto* kind : {&values, &scratch})
    for (Block& block : *kind) blocks.push_back(&block);
  image_bytes = place(blocks);
}

Engine::Engine(Shape input, const std::vector<OpSpec>& specs, int threads, std::string_view isa, bool tune) {
  require(threads >= 1 && threads <= kMaxThreads, "threads must be 1 to 256");
  require(!specs.empty() && specs.size() <= kMaxOps, "the graph must have 1 to 4096 ops");
  for (const int64_t extent : {input.height, input.width, input.channels})
    require(extent >= 1 && extent <= kMaxExtent, "the input shape is out of range");
  require(input.pixels() <= kMaxElements && input.elements() <= kMaxElements && input.is_float(),
          "the input is too large");
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

  s.make_groups();
  s.find_homes();
  s.plan_memory();
  s.arena.resize(s.image_bytes);
  s.thread_scratch.resize(s.thread_bytes * s.pool->size());
  s.followers.resize(s.pool->size());
  if (tune)
    for (const auto& op : s.ops) op->tune(Measure(s.kernels.isa, *s.pool));
}

Engine::~Engine() = default;

void Engine::State::run(const Lane& lane, const float* images, float* outputs, double* seconds) {
  using Clock = std::chrono::steady_clock;
  const Shape &in = shapes.front(), &out = shapes.back();
  auto* pixels = reinterpret_cast<float*>(value(lane, 0));
  lane.pool.run(static_cast<size_t>(lane.batch),
                [&](size_t n, int) { to_channels_last(images + n * in.elements(), in, pixels + n * in.elements()); });
  for (size_t number = 0; number < groups.size(); ++number) {
    const auto start = Clock::now();
    const Group& group = groups[number];
    const Op& head = *ops[group.head];
    lane.followers.clear();
    for (const size_t i : group.followers) lane.followers.push_back({pixelwise[i], operands(lane, i)});
    Call call{
        operands(lane, group.head), lane.at(scratch[number]), lane.thread_scratch, thread_bytes, lane.batch, lane.pool};
    if (group.joined) {
      call.output = lane.followers[0].operands.output;
      head.run_joined(*lane.followers[0].op, call);
    } else {
      call.followers = lane.followers;
      head.run(call);
    }
    if (seconds != nullptr) seconds[group.head] += std::chrono::duration<double>(Clock::now() - start).count();
  }
  const auto* results = reinterpret_cast<const float*>(value(lane, ops.size()));
  for (int64_t n = 0; n < lane.batch; ++n)
    to_channels_first(results + n * out.elements(), out, outputs + n * out.elements());
}

// Threads take images of their own where there are enough for all, and need not wait for each other then; else, and
// where ops are timed, they share the work of each op.
void Engine::run(const float* images, int64_t batch, float* outputs, double* seconds) {
  State& s = *state_;
  const std::lock_guard lock(*s.mutex);
  const int64_t threads = s.pool->size(), in = s.shapes.front().elements(), out = s.shapes.back().elements();
  const bool apart = threads > 1 && seconds == nullptr && (batch % threads == 0 || batch >= kEnoughImages * threads);
  const int64_t lanes = apart ? threads : 1;
  const int64_t most = std::clamp<int64_t>(kChunkBytes * (threads / lanes) / s.image_bytes, 1, kMaxChunk);
  const int64_t chunk = std::min(most, ceil_div(batch, lanes)), lane_bytes = s.image_bytes * chunk;
  if (static_cast<int64_t>(s.arena.size()) < lane_bytes * lanes) s.arena.resize(lane_bytes * lanes);
  const auto run = [&](size_t number, int thread, ThreadPool& pool) {
    const int64_t first = static_cast<int64_t>(number) * chunk;
    s.run({s.arena.data() + thread * lane_bytes, std::min(chunk, batch - first), pool,
           s.thread_scratch.data() + thread * s.thread_bytes, s.followers[thread]},
          images + first * in, outputs + first * out, seconds);
  };
  const auto chunks = static_cast<size_t>(batch == 0 ? 0 : ceil_div(batch, chunk));
  if (apart)
    s.pool->run(chunks, [&](size_t number, int thread) { run(number, thread, s.alone); });
  else
    for (size_t number = 0; number < chunks; ++number) run(number, 0, *s.pool);
}

void Engine::run_op(size_t index, const std::vector<const void*>& inputs, int64_t batch, void* output) {
  State& s = *state_;
  const std::lock_guard lock(*s.mutex);
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
          s.thread_bytes,
          batch,
          *s.pool});
  if (shape.bits == 1) unpack_bits(packed.data(), shape, shape.pixels() * batch, static_cast<uint8_t*>(output));
}

void Engine::after_fork() {
  // What the threads of the parent held stays held, and joining them would wait for ever: both are left as they are.
  (void)state_->pool.release();
  (void)state_->mutex.release();
  state_->pool = std::make_unique<ThreadPool>(1);
  state_->mutex = std::make_unique<std::mutex>();
}

size_t Engine::op_count() const { return state_->ops.size(); }
const std::vector<size_t>& Engine::op_inputs(size_t index) const { return state_->inputs.at(index); }
std::string_view Engine::op_kernel(size_t index) const {
  const Group& group = state_->groups[state_->group_of_op.at(index)];
  if (group.joined && group.head != index) return "";
  return state_->ops[index]->kernel(group.joined);
}
const Shape& Engine::value(size_t number) const { return state_->shapes.at(number); }
std::string_view Engine::isa() const { return state_->kernels.isa; }
int Engine::threads() const { return state_->pool->size(); }

}  // namespace lowbit
