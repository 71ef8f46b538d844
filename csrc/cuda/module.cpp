// The extension module uml_fast._native_cuda. Importing it needs neither a driver nor a GPU.
#include <pybind11/pybind11.h>

#include <memory>

#include "cuda/device.h"

namespace py = pybind11;

PYBIND11_MODULE(_native_cuda, m) {
  py::module_::import("uml_fast._native");  // defines the base class Device
  m.def("device_count", &uml::cuda_device_count);
  py::class_<uml::CudaDevice, uml::Device, std::shared_ptr<uml::CudaDevice>>(m, "CudaDevice")
      .def(py::init<int>(), py::arg("index"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("index", &uml::CudaDevice::index);
}
