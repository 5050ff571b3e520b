// The engine as the Python module lowbit._engine. Arguments are checked here for what memory safety needs; the
// sentences that users read are written by lowbit.packed and lowbit.runtime.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "lowbit/engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Images = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

lowbit::Type type_of(const Array& array) {
  if (array.dtype() == nb::dtype<float>()) return lowbit::Type::f32;
  if (array.dtype() == nb::dtype<int32_t>()) return lowbit::Type::i32;
  if (array.dtype() == nb::dtype<uint8_t>()) return lowbit::Type::u8;
  if (array.dtype() == nb::dtype<uint64_t>()) return lowbit::Type::u64;
  throw std::invalid_argument("a tensor has a type that the engine does not know");
}

std::vector<int64_t> shape_of(const Array& array) {
  std::vector<int64_t> shape;
  for (size_t axis = 0; axis < array.ndim(); ++axis) shape.push_back(static_cast<int64_t>(array.shape(axis)));
  return shape;
}

std::array<int64_t, 2> pair(nb::handle value) {
  const auto numbers = nb::cast<std::vector<int64_t>>(value);
  if (numbers.size() != 2) throw std::invalid_argument("a window attribute is no pair");
  return {numbers[0], numbers[1]};
}

// An op as lowbit.packed stores it. `kept` holds the arrays that the spec's tensors borrow.
lowbit::OpSpec to_spec(const nb::dict& op, const nb::dict& tensors, std::vector<Array>& kept) {
  lowbit::OpSpec spec;
  for (const auto& [key, value] : op) {
    const auto name = nb::cast<std::string>(key);
    if (name == "op")
      spec.op = nb::cast<std::string>(value);
    else if (name == "inputs")
      spec.inputs = nb::cast<std::vector<int64_t>>(value);
    else if (name == "kernel")
      spec.kernel = pair(value);
    else if (name == "stride")
      spec.stride = pair(value);
    else if (name == "padding")
      spec.padding = pair(value);
    else if (name == "dilation")
      spec.dilation = pair(value);
    else if (name == "groups")
      spec.groups = nb::cast<int64_t>(value);
    else if (name == "channels")
      spec.channels = nb::cast<int64_t>(value);
    else if (name == "bits")
      spec.bits = nb::cast<int64_t>(value);
    else if (name == "input_multiplier")
      spec.input_multiplier = nb::cast<int64_t>(value);
    else if (name == "input_offset")
      spec.input_offset = nb::cast<int64_t>(value);
    else if (name == "weight_width")
      spec.weight_width = nb::cast<int64_t>(value);
    else if (name == "weight_multiplier")
      spec.weight_multiplier = nb::cast<int64_t>(value);
    else if (name == "weight_offset")
      spec.weight_offset = nb::cast<int64_t>(value);
    else if (name == "count_include_pad")
      spec.count_include_pad = nb::cast<bool>(value);
    else if (name == "min")
      spec.min = nb::cast<double>(value);
    else if (name == "max")
      spec.max = nb::cast<double>(value);
    else if (name != "source")
      throw std::invalid_argument("an op has the unknown attribute '" + name + "'");
  }
  for (const auto& [key, value] : tensors) {
    const auto& array = kept.emplace_back(nb::cast<Array>(value));
    spec.tensors[nb::cast<std::string>(key)] = {type_of(array), shape_of(array), array.data()};
  }
  return spec;
}

nb::object new_array(const lowbit::Shape& shape, const std::vector<int64_t>& extents) {
  const auto numpy = nb::module_::import_("numpy");
  return numpy.attr("empty")(nb::tuple(nb::cast(extents)), shape.is_float() ? "float32" : "uint8");
}

class PyEngine {
 public:
  PyEngine(const std::vector<int64_t>& input_shape, const nb::list& ops, const nb::list& tensors, int threads)
      : engine_(make(input_shape, ops, tensors, threads)) {}

  nb::object run(const Images& images, nb::object seconds) {
    const lowbit::Shape &in = engine_.value(0), &out = engine_.value(engine_.op_count());
    const auto batch = static_cast<int64_t>(images.shape(0));
    if (shape_of(Array(images)) != std::vector<int64_t>{batch, in.channels, in.height, in.width})
      throw std::invalid_argument("the images have the wrong shape");
    nb::object result = new_array(out, {batch, out.channels, out.height, out.width});
    auto* data = static_cast<float*>(nb::cast<nb::ndarray<float, nb::c_contig>>(result).data());
    std::vector<double> times(engine_.op_count());
    bool finite;
    {
      const nb::gil_scoped_release release;
      finite = engine_.run(images.data(), batch, data, seconds.is_none() ? nullptr : times.data());
    }
    if (!finite) return nb::none();
    if (!seconds.is_none())
      for (const double time : times) seconds.attr("append")(time);
    return result;
  }

  nb::object run_op(size_t index, const std::vector<Array>& inputs) {
    if (index >= engine_.op_count()) throw std::invalid_argument("there is no such op");
    const auto& numbers = engine_.op_inputs(index);
    if (inputs.size() != numbers.size()) throw std::invalid_argument("the op has another number of inputs");
    if (inputs[0].ndim() != 4) throw std::invalid_argument("an input must have 4 axes");
    const auto batch = static_cast<int64_t>(inputs[0].shape(0));
    std::vector<const void*> data;
    for (size_t k = 0; k < inputs.size(); ++k) {
      const lowbit::Shape& shape = engine_.value(numbers[k]);
      if (type_of(inputs[k]) != (shape.is_float() ? lowbit::Type::f32 : lowbit::Type::u8) ||
          shape_of(inputs[k]) != std::vector<int64_t>{batch, shape.height, shape.width, shape.channels})
        throw std::invalid_argument("an input has the wrong type or shape");
      data.push_back(inputs[k].data());
    }
    const lowbit::Shape& out = engine_.value(index + 1);
    nb::object result = new_array(out, {batch, out.height, out.width, out.channels});
    void* output = nb::cast<nb::ndarray<nb::c_contig>>(result).data();
    {
      const nb::gil_scoped_release release;
      engine_.run_op(index, data, batch, output);
    }
    return result;
  }

  void after_fork() { engine_.after_fork(); }
  std::string isa() const { return std::string(engine_.isa()); }
  std::vector<std::string> kernels() const {
    std::vector<std::string> names;
    for (size_t index = 0; index < engine_.op_count(); ++index) names.emplace_back(engine_.op_kernel(index));
    return names;
  }
  int threads() const { return engine_.threads(); }

 private:
  static lowbit::Engine make(const std::vector<int64_t>& input_shape, const nb::list& ops, const nb::list& tensors,
                             int threads) {
    if (input_shape.size() != 3) throw std::invalid_argument("the input shape must be (channels, height, width)");
    if (ops.size() != tensors.size()) throw std::invalid_argument("there must be one dict of tensors for each op");
    std::vector<Array> kept;
    std::vector<lowbit::OpSpec> specs;
    for (size_t i = 0; i < ops.size(); ++i)
      specs.push_back(to_spec(nb::cast<nb::dict>(ops[i]), nb::cast<nb::dict>(tensors[i]), kept));
    const char* isa = std::getenv("LOWBIT_ISA");
    const char* tune = std::getenv("LOWBIT_TUNE");
    const char* strip = std::getenv("LOWBIT_STRIP_BYTES");
    return lowbit::Engine(
        {input_shape[1], input_shape[2], input_shape[0]}, specs, threads, isa == nullptr ? "" : isa,
        tune == nullptr || std::string_view(tune) != "0",
        strip == nullptr ? lowbit::kStripBytes : std::clamp(std::strtoll(strip, nullptr, 10), 1ll, 1ll << 40));
  }

  lowbit::Engine engine_;
};

}  // namespace

NB_MODULE(_engine, m) {
  m.doc() = "The native engine of lowbit; use lowbit.Engine.";
  m.def("built_isas", &lowbit::built_isas, "The instruction sets of this build, the best first.");
  m.def("available_isas", &lowbit::available_isas, "Those that this CPU runs, the best first: what LOWBIT_ISA may be.");
  m.def("peak", &lowbit::peak, "kind"_a, "isa"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Products a second of one core, at most.");
  nb::class_<PyEngine>(m, "Engine")
      .def(nb::init<const std::vector<int64_t>&, const nb::list&, const nb::list&, int>(), "input_shape"_a, "ops"_a,
           "tensors"_a, "threads"_a)
      .def("run", &PyEngine::run, "images"_a, "seconds"_a = nb::none())
      .def("run_op", &PyEngine::run_op, "index"_a, "inputs"_a)
      .def("after_fork", &PyEngine::after_fork)
      .def_prop_ro("isa", &PyEngine::isa)
      .def_prop_ro("kernels", &PyEngine::kernels)
      .def_prop_ro("threads", &PyEngine::threads);
}
