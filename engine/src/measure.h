// Which of two ways to compute the same is faster: measured when an engine is built, once in a process for each shape.
#pragma once

#include <functional>
#include <string>

#include "op.h"

namespace lowbit {

// What the time of a convolution depends on.
std::string describe(const OpSpec& spec, const Shape& input, int output_bits);

class Measure {
 public:
  Measure(std::string isa, ThreadPool& pool) : isa_(std::move(isa)), pool_(pool) {}

  // Runs `op` on `batch` images of zeros after choose(true) and after choose(false). The first way is the rule: the
  // second must be faster by a tenth, and where a run would take much memory nothing is measured. The caller chooses
  // for good.
  bool first_is_faster(const Op& op, const Shape& input, const std::string& shape, int64_t batch,
                       const std::function<void(bool first)>& choose) const;

 private:
  std::string isa_;
  ThreadPool& pool_;
};

}  // namespace lowbit
