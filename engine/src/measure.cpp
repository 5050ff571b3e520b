#include "measure.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <mutex>

namespace lowbit {
namespace {

// Runs of each way, in turns; the first of them warms up, and the fastest counts. If the second way is ahead after
// the fewer ones, it goes on, as long as it is: what slows the other way may be somebody else's work.
constexpr int kRuns = 4, kMostRuns = 16;
constexpr double kLongRun = 0.02;  // seconds, of which a first and a second one are enough
constexpr double kGain = 0.9;
constexpr double kMostBytes = 1 << 28;  // of memory; what takes more is not measured

}  // namespace

std::string describe(const OpSpec& spec, const Shape& input, int output_bits) {
  std::string shape;
  for (const auto& pair : {spec.kernel, spec.stride, spec.padding, spec.dilation})
    shape += std::to_string(pair[0]) + "x" + std::to_string(pair[1]) + " ";
  for (const int64_t number : {spec.groups, spec.channels, input.height, input.width, input.channels,
                               int64_t{input.bits}, int64_t{output_bits}})
    shape += std::to_string(number) + " ";
  return shape;
}

bool Measure::first_is_faster(const Op& op, const Shape& input, const std::string& shape, int64_t batch,
                              const std::function<void(bool first)>& choose) const {
  static std::mutex mutex;
  static std::map<std::string, bool> known;
  const std::lock_guard lock(mutex);
  const std::string key = isa_ + " " + std::to_string(pool_.size()) + " " + std::to_string(batch) + " " + shape;
  if (const auto found = known.find(key); found != known.end()) return found->second;

  const int64_t thread_bytes = round_up(op.thread_scratch_bytes(), kAlignment);
  const int64_t image_bytes = input.bytes() + op.output().bytes() + op.scratch_bytes();
  if (static_cast<double>(image_bytes) * batch + static_cast<double>(thread_bytes) * pool_.size() > kMostBytes)
    return true;
  Buffer<std::byte> in(input.bytes() * batch), out(op.output().bytes() * batch), scratch(op.scratch_bytes() * batch),
      thread_scratch(thread_bytes * pool_.size());
  const Call call{{{in.data()}, out.data()},         scratch.data(), thread_scratch.data(),
                  static_cast<size_t>(thread_bytes), batch,          pool_};
  double best[2] = {std::numeric_limits<double>::max(), std::numeric_limits<double>::max()};
  const auto second_is_faster = [&] { return best[false] <= kGain * best[true]; };
  double longest = 0;
  const auto goes_on = [&](int run) {
    if (run > 1 && longest > kLongRun) return false;
    return run < kRuns || (run < kMostRuns && second_is_faster());
  };
  for (int run = 0; goes_on(run); ++run)
    for (const bool first : {true, false}) {
      choose(first);
      const auto start = std::chrono::steady_clock::now();
      op.run(call);
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      if (run > 0) best[first] = std::min(best[first], time.count());
      longest = std::max(longest, time.count());
    }
  return known[key] = !second_is_faster();
}

}  // namespace lowbit
