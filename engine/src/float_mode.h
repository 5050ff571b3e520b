#pragma once

#include <cfenv>

namespace lowbit {

// While it lives, this thread rounds to nearest and computes with denormal numbers, as every thread does at first. A
// caller may do otherwise (torch.set_flush_denormal), and threads that started before it would not know.
class DefaultFloatMode {
 public:
  DefaultFloatMode() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatMode() { std::fesetenv(&before_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace lowbit
