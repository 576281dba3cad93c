// The Python module `fastft_kernels._C`. Only this file knows Python, and no file knows torch: tensors arrive as
// addresses with sizes, strides and a dtype code. The callers in kernels/fastft_kernels/cpp check what they pass.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/matrix.h"
#include "cpu/adamw.h"
#include "cpu/gated_activation.h"
#include "cpu/gelu.h"
#include "cpu/dora.h"
#include "cpu/dropout.h"
#include "cpu/layer_norm.h"
#include "cpu/cross_entropy.h"
#include "cpu/lora.h"
#include "cpu/nf4.h"
#include "cpu/attention.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"
#ifdef FASTFT_CUDA
#include "cuda/adamw8bit.h"
#include "cuda/nf4.h"
#endif

namespace py = pybind11;
using namespace fastft;

namespace {

// How a C++ argument arrives from Python: pointers and enumerations as integers.
template <class T>
using FromPython =
    std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, std::conditional_t<std::is_enum_v<T>, int, T>>;

template <class T>
T from_python(FromPython<T> value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return static_cast<T>(value);
}

// Registers `function` under `name`; the interpreter lock is released while it runs.
template <class... Args>
void define(py::module_& module, const char* name, void (*function)(Args...)) {
  module.def(
      name, [function](FromPython<Args>... args) { function(from_python<Args>(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

py::list supported_isas() {
  py::list names;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) names.append(kIsaNames[i]);
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (name == kIsaNames[i]) {
      active_isa() = static_cast<Isa>(i);
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not supported by this CPU; see isas()");
}

py::list supported_matrices() {
  py::list names;
  for (int i = 0; i < kMatrices; ++i)
    if (supports(static_cast<Matrix>(i))) names.append(kMatrixNames[i]);
  return names;
}

void set_matrix(const std::string& name) {
  for (int i = 0; i < kMatrices; ++i) {
    if (name == kMatrixNames[i] && supports(static_cast<Matrix>(i))) {
      active_matrix() = static_cast<Matrix>(i);
      return;
    }
  }
  throw std::invalid_argument("matrix instructions '" + name + "' are not supported by this CPU; see matrices()");
}

}  // namespace

#ifndef FASTFT_SOURCES  // see kernels/fastft_kernels/cpp/sources.py
#define FASTFT_SOURCES unknown
#endif
#define FASTFT_TEXT(token) #token
#define FASTFT_TEXT_OF(macro) FASTFT_TEXT(macro)

PYBIND11_MODULE(_C, module) {
  module.attr("sources") = FASTFT_TEXT_OF(FASTFT_SOURCES);

  module.def("isas", supported_isas, "Names of the instruction sets this CPU can run, weakest first.");
  module.def("isa", [] { return kIsaNames[static_cast<int>(active_isa())]; }, "The instruction set in use.");
  module.def("set_isa", set_isa, "Uses a weaker instruction set from now on: for tests.");

  module.def("matrices", supported_matrices, "Names of the bfloat16 matrix instructions that can be used here.");
  module.def("matrix", [] { return kMatrixNames[static_cast<int>(active_matrix())]; }, "Those in use.");
  module.def("set_matrix", set_matrix, "Uses others from now on: for tests.");

  py::dict dtypes;
  for (int i = 0; i < 3; ++i) dtypes[kDTypeNames[i]] = i;
  module.attr("dtypes") = dtypes;

#ifdef FASTFT_CUDA
  module.attr("has_cuda") = true;
  module.def("cuda_device_count", cuda_device_count, "CUDA devices that the driver offers; 0 where there is no driver.");
  define(module, "cuda_adamw8bit", cuda_adamw8bit);
  define(module, "cuda_lion8bit", cuda_lion8bit);
  define(module, "cuda_nf4_dequantize", cuda_nf4_dequantize);
#else
  module.attr("has_cuda") = false;
#endif

  define(module, "adamw", adamw);
  define(module, "adamw8bit", adamw8bit);
  define(module, "dequantize8", dequantize8);
  define(module, "gated_activation_forward", gated_activation_forward);
  define(module, "gated_activation_backward", gated_activation_backward);
  define(module, "gelu_forward", gelu_forward);
  define(module, "gelu_backward", gelu_backward);
  define(module, "lion8bit", lion8bit);
  define(module, "quantize8", quantize8);
  define(module, "dora_forward", dora_forward);
  define(module, "dora_backward", dora_backward);
  define(module, "dropout", dropout);
  define(module, "layer_norm_forward", layer_norm_forward);
  define(module, "layer_norm_backward", layer_norm_backward);
  define(module, "cross_entropy_forward", cross_entropy_forward);
  define(module, "lora_apply_mask", lora_apply_mask);
  define(module, "nf4_quantize", nf4_quantize);
  define(module, "nf4_dequantize", nf4_dequantize);
  define(module, "attention_forward", attention_forward);
  define(module, "attention_backward", attention_backward);
  define(module, "rms_norm_forward", rms_norm_forward);
  define(module, "rms_norm_backward", rms_norm_backward);
  define(module, "rope", rope);
  define(module, "square_sum", square_sum);
}
