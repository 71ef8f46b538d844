// Batches of images out of open files. Every call releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu/kernels.h"

namespace py = pybind11;

void bind_images(py::module_& m) {
  using Descriptors = py::array_t<int32_t, py::array::c_style>;
  using Places = py::array_t<int64_t, py::array::c_style>;
  using Pixels = py::array_t<uint8_t, py::array::c_style>;
  using Flags = py::array_t<bool, py::array::c_style>;

  m.def(
      "read_jpegs",
      [](const Descriptors& descriptors, const Places& offsets, const Places& sizes, int64_t height,
         int64_t width, int64_t channels, int64_t patch_height, int64_t patch_width, Pixels& out,
         Flags& is_read) {
        const int64_t count = descriptors.size();
        const uml::PatchShape shape{count, height, width, channels, patch_height, patch_width};
        if (offsets.size() != count || sizes.size() != count || is_read.size() != count ||
            out.size() != count * height * width * channels) {
          throw std::invalid_argument("read_jpegs: the arrays differ in their number of images");
        }
        const uml::JpegBatch batch{count, descriptors.data(), offsets.data(), sizes.data()};
        uint8_t* pixels = out.mutable_data();
        bool* read = is_read.mutable_data();
        py::gil_scoped_release nogil;
        return uml::kernels().read_jpegs(batch, shape, pixels, read);
      },
      py::arg("descriptors").noconvert(), py::arg("offsets").noconvert(),
      py::arg("sizes").noconvert(), py::arg("height"), py::arg("width"), py::arg("channels"),
      py::arg("patch_height"), py::arg("patch_width"), py::arg("out").noconvert(),
      py::arg("is_read").noconvert());
}
