// The extension module uml_fast._native: the scheduler and the CPU kernels.
#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_& m);
void bind_images(pybind11::module_& m);
void bind_loader(pybind11::module_& m);

PYBIND11_MODULE(_native, m) {
  bind_cpu(m);
  bind_images(m);
  bind_loader(m);
  m.attr("sources") = UML_SOURCES;  // what this was built from: csrc/bind
}
