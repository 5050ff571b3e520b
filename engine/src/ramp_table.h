// Lines through the thresholds of channels, proved to lead to the same codes as the thresholds themselves.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "output_transform.h"

namespace lowbit {

// What a kernel needs for a row of values, or a part of it, and the memory behind it. Places rise with values, so it is
// enough to look at the two sides of each threshold: they say how far a place may be off, and that the nearest
// threshold is the right one to ask.
template <class T>
class RampTable {
 public:
  // `channels` names the channel of each value of a row, and is -1 for one that nothing reads. Nothing comes back where
  // the thresholds of a channel do not rise evenly enough.
  static std::optional<RampTable> fit(const Thresholds<T>& thresholds, std::span<const int64_t> channels) {
    RampTable table(channels.size());
    std::map<std::pair<const T*, bool>, size_t> seen;  // the first value with these thresholds
    for (size_t i = 0; i < channels.size(); ++i) {
      if (channels[i] < 0) continue;
      const T* limits = thresholds.of(channels[i]);
      const auto [found, is_new] = seen.try_emplace({limits, thresholds.falling(channels[i])}, i);
      if (!is_new)
        table.repeat(found->second, i);
      else if (!table.add(i, std::span(limits, thresholds.levels()), thresholds.falling(channels[i])))
        return std::nullopt;
    }
    table.alike_ = seen.size() == 1 && std::find(channels.begin(), channels.end(), -1) == channels.end();
    return table;
  }

  // For values from number `first` of the row on.
  Ramp<T> from(int64_t first) const {
    return {slope_.data() + first,
            start_.data() + first,
            low_.data() + first,
            high_.data() + first,
            flips_.data() + first,
            rows_.data() + first,
            limits_.data(),
            slack_,
            alike_};
  }

  size_t size() const { return slope_.size(); }

 private:
  // A value that nothing reads has a place between the first two codes, wherever it lies.
  explicit RampTable(size_t size)
      : slope_(size), start_(size), low_(size, 0.5f), high_(size, 0.5f), flips_(size), rows_(size) {}

  void repeat(size_t i, size_t at) {
    slope_[at] = slope_[i];
    start_[at] = start_[i];
    low_[at] = low_[i];
    high_[at] = high_[i];
    flips_[at] = flips_[i];
    rows_[at] = rows_[i];
  }

  bool add(size_t i, std::span<const T> thresholds, bool falling) {
    constexpr T kLowest = std::numeric_limits<T>::lowest(), kHighest = std::numeric_limits<T>::max();
    flips_[i] = flip_of<T>(falling);
    rows_[i] = static_cast<int32_t>(limits_.size());
    for (const T threshold : thresholds) limits_.push_back(flipped(threshold, flips_[i]));
    const std::span<const T> limits(limits_.data() + rows_[i], thresholds.size());
    if constexpr (std::is_same_v<T, float>)
      if (!std::all_of(limits.begin(), limits.end(), [](float limit) { return std::isfinite(limit); })) return false;
    if (!std::is_sorted(limits.begin(), limits.end())) return false;

    // Integers have thresholds that every sum passes and thresholds that no sum reaches: the line is for the others.
    int64_t first = 0, end = static_cast<int64_t>(limits.size());
    if constexpr (std::is_integral_v<T>) {
      first = std::upper_bound(limits.begin(), limits.end(), kLowest) - limits.begin();
      end = std::lower_bound(limits.begin() + first, limits.end(), kHighest) - limits.begin();
    }
    low_[i] = static_cast<float>(first + 0.5);
    high_[i] = static_cast<float>(end) + kTop;
    if (first == end) low_[i] = high_[i] = end == 0 ? low_[i] : high_[i];  // one code, and a threshold beside it
    if (end - first > 1) {
      const double rise = static_cast<double>(limits[end - 1]) - static_cast<double>(limits[first]);
      slope_[i] = static_cast<float>(static_cast<double>(end - 1 - first) / rise);
    }
    if (!std::isfinite(slope_[i])) return false;
    if (first < end) start_[i] = static_cast<float>(first + 1 - slope_[i] * static_cast<double>(limits[first]));
    for (int64_t level = first; level < end; ++level) {
      const T limit = limits[level];
      const T below = std::is_same_v<T, float> ? static_cast<T>(std::nextafter(static_cast<float>(limit), -INFINITY))
                                               : static_cast<T>(limit - 1);
      const float reached = place(i, limit), missed = place(i, below);
      if (nearest(reached) < level || nearest(missed) > level) return false;
      const auto next = static_cast<float>(level + 1);
      slack_ = std::max({slack_, next - reached, missed - next});
    }
    // Rounded up to where 1 - slack is exact. Far off, there is always a look at the threshold.
    slack_ = slack_ < kMostSlack ? std::ceil(slack_ * kSlackSteps) / kSlackSteps : 1;
    return true;
  }

  // As the kernels do.
  float place(size_t i, T value) const {
    const float place = static_cast<float>(value) * slope_[i] + start_[i];
    const float raised = place > low_[i] ? place : low_[i];
    return raised < high_[i] ? raised : high_[i];
  }
  static int64_t nearest(float place) { return static_cast<int64_t>(place + 0.5f) - 1; }

  // Above the last code: as far off as can be, and yet nearest to the last threshold.
  static constexpr float kTop = 0.4375f;
  static constexpr float kMostSlack = 0.0625f, kSlackSteps = 1 << 16;

  std::vector<float> slope_, start_, low_, high_;
  std::vector<uint32_t> flips_;
  std::vector<int32_t> rows_;
  std::vector<T> limits_;
  float slack_ = 0;
  bool alike_ = false;
};

}  // namespace lowbit
