// JPEG files to patches of pixels, bit for bit as libjpeg-turbo decodes them by default: the
// accurate integer transform, smooth ("fancy") upsampling of colours, its fixed-point RGB.
//
// Only plain whole files are decoded. Whatever is unusual, cut off or broken is left to the caller,
// who has a library for it; so the two never differ in what they accept. Against one call of that
// library per picture this saves its set-up (tables, buffers) and the interpreter's.
#include "jpeg_pixels.h"
#include "kernel_parts.h"

namespace uml::UML_ARCH {

int64_t read_jpegs(const JpegBatch& batch, PatchShape shape, uint8_t* out, bool* is_read) {
  thread_local Scratch scratch;
  const int64_t image_bytes = shape.height * shape.width * shape.channels;
  int64_t count = 0;
  for (int64_t i = 0; i < batch.count; ++i) {
    JpegFile file;
    Planes planes;
    const uint8_t* bytes =
        read_file(batch.descriptors[i], batch.offsets[i], batch.sizes[i], scratch.file);
    is_read[i] =
        bytes != nullptr &&
        read_jpeg_headers(bytes, static_cast<size_t>(batch.sizes[i]), scratch.tables, file) &&
        file.height == shape.height && file.width == shape.width &&
        decode_planes(file, scratch, planes);
    if (!is_read[i]) continue;
    write_patches(file, planes, scratch, shape, out + i * image_bytes);
    ++count;
  }
  return count;
}

}  // namespace uml::UML_ARCH
