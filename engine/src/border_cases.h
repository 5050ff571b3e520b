// Which taps of a window lie inside the image, by output position.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "op.h"

namespace lowbit {

// It depends only on the case of the position's row and column: most positions see every tap, those near a border
// fewer.
class BorderCases {
 public:
  BorderCases(const Shape& input, const Window& window) : kernel_(window.kernel) {
    std::vector<int64_t> row_case, column_case;
    rows_ = ranges(window, 0, window.height, input.height, row_case);
    columns_ = ranges(window, 1, window.width, input.width, column_case);
    for (const int64_t row : row_case)
      for (const int64_t column : column_case)
        of_position_.push_back(static_cast<int32_t>(row * columns_.size() + column));
  }

  int64_t size() const { return static_cast<int64_t>(rows_.size() * columns_.size()); }
  int64_t of_position(int64_t position) const { return of_position_[position]; }

  // For each case the sum of `of_tap`, a number to each tap, over the taps inside the image.
  std::vector<int64_t> sums_inside(const std::vector<int64_t>& of_tap) const {
    const int64_t width = kernel_[1] + 1;
    std::vector<int64_t> before((kernel_[0] + 1) * width);  // sums of the taps above and to the left of (ky, kx)
    for (int64_t ky = 0; ky < kernel_[0]; ++ky)
      for (int64_t kx = 0; kx < kernel_[1]; ++kx) {
        const int64_t at = ky * width + kx;
        before[at + width + 1] = before[at + 1] + before[at + width] - before[at] + of_tap[ky * kernel_[1] + kx];
      }
    std::vector<int64_t> sums;
    for (const Range& row : rows_)
      for (const Range& column : columns_)
        sums.push_back(before[row.end * width + column.end] - before[row.begin * width + column.end] -
                       before[row.end * width + column.begin] + before[row.begin * width + column.begin]);
    return sums;
  }

 private:
  struct Range {
    int64_t begin, end;  // taps inside the image
    auto operator<=>(const Range&) const = default;
  };

  // The different ranges of taps along one axis; `cases` gets the number of each output position's range.
  static std::vector<Range> ranges(const Window& window, int axis, int64_t outputs, int64_t extent,
                                   std::vector<int64_t>& cases) {
    std::map<Range, int64_t> numbers;
    std::vector<Range> found;
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t start = i * window.stride[axis] - window.padding[axis], step = window.dilation[axis];
      Range range{0, window.kernel[axis]};
      range.begin = std::min(range.end, start < 0 ? ceil_div(-start, step) : 0);
      range.end = std::clamp(extent > start ? ceil_div(extent - start, step) : 0, range.begin, range.end);
      const auto [entry, fresh] = numbers.try_emplace(range, static_cast<int64_t>(found.size()));
      if (fresh) found.push_back(range);
      cases.push_back(entry->second);
    }
    return found;
  }

  std::array<int64_t, 2> kernel_;
  std::vector<Range> rows_, columns_;
  std::vector<int32_t> of_position_;  // small: it is read for every pixel
};

}  // namespace lowbit
