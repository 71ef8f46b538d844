// The CPU kernels for Python: addresses and sizes in, nothing out. Callers (uml_fast/kernels) check
// arguments and keep the tensors alive; every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace uml {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// `rng_key` is the address of the step's key; not read when threshold is 0.
Dropout dropout_of(Address rng_key, int64_t site, uint32_t threshold) {
  if (threshold == 0) return {};
  const uint64_t key = site_key(*at<const uint64_t>(rng_key), site);
  return {key, threshold, static_cast<float>(65536.0 / (65536.0 - threshold))};
}

AttentionShape attention_shape(Address offsets, int64_t segments, int64_t heads, int64_t head_dim,
                               int64_t max_len, int64_t qkv_stride, bool is_causal, double scale,
                               int dtype) {
  return {at<const int32_t>(offsets),
          segments,
          heads,
          head_dim,
          max_len,
          qkv_stride,
          is_causal,
          static_cast<float>(scale),
          static_cast<DType>(dtype)};
}

LossChunk loss_chunk(int dtype, int64_t rows, int64_t cols, Address product, Address counts,
                     Address bias_grad, Address totals) {
  return {rows,
          cols,
          static_cast<DType>(dtype),
          at<void>(product),
          at<const uint8_t>(counts),
          at<float>(bias_grad),
          at<double>(totals)};
}

// Arguments of head_source, head_branch and head_cell.
using SourceArguments = std::tuple<Address, Address, int64_t>;
using BranchArguments = std::tuple<SourceArguments, Address, int64_t, float, bool>;
using CellArguments = std::tuple<Address, Address, Address, Address, int64_t, int64_t, float, bool,
                                 Address, Address, int64_t>;

HeadSource head_source(Address rows, Address labels, int64_t width) {
  return {at<const float>(rows), at<const int32_t>(labels), width};
}

HeadBranch head_branch(const SourceArguments& source, Address order, int64_t batch, float weight,
                       bool is_projected) {
  return {std::apply(head_source, source), at<const int32_t>(order), batch, weight, is_projected};
}

HeadCell head_cell(Address weights, Address first, Address second, Address rates, int64_t begin,
                   int64_t steps, float weight_decay, bool learns_scale, Address folded,
                   Address held_out, int64_t held_out_count) {
  return {at<float>(weights),
          at<float>(first),
          at<float>(second),
          at<const float>(rates),
          begin,
          steps,
          weight_decay,
          learns_scale,
          nullptr,
          0,
          at<float>(folded),
          at<const int32_t>(held_out),
          held_out_count,
          0};
}

// The next steps of each cell; returns how many held-out samples each gets right after them.
std::vector<int64_t> train_heads(
    int threads, const SourceArguments& validation, int64_t classes, bool may_halve,
    const std::vector<std::pair<CellArguments, std::vector<BranchArguments>>>& arguments) {
  std::vector<std::vector<HeadBranch>> branches(arguments.size());
  std::vector<HeadCell> cells;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& [cell, own] = arguments[i];
    for (const BranchArguments& a : own) branches[i].push_back(std::apply(head_branch, a));
    cells.push_back(std::apply(head_cell, cell));
    cells[i].branches = branches[i].data();
    cells[i].branch_count = static_cast<int64_t>(own.size());
  }
  const HeadGrid grid{std::apply(head_source, validation), classes, may_halve};
  {
    const py::gil_scoped_release release;
    kernels().train_heads(threads, grid, cells.data(), static_cast<int64_t>(cells.size()));
  }
  std::vector<int64_t> right;
  for (const HeadCell& cell : cells) right.push_back(cell.right);
  return right;
}

// How many of the first samples of a source each folded matrix gets right.
std::vector<int64_t> test_heads(int threads, const SourceArguments& source, int64_t samples,
                                int64_t classes, const std::vector<Address>& folded) {
  std::vector<const float*> matrices;
  for (const Address address : folded) matrices.push_back(at<const float>(address));
  std::vector<int64_t> right(folded.size());
  {
    const py::gil_scoped_release release;
    kernels().test_heads(threads, std::apply(head_source, source), samples, classes,
                         matrices.data(), static_cast<int64_t>(folded.size()), right.data());
  }
  return right;
}

}  // namespace
}  // namespace uml

void bind_cpu(py::module_& module) {
  using namespace uml;
  py::module_ m = module.def_submodule("cpu", "Kernels for this processor.");
  const py::call_guard<py::gil_scoped_release> nogil;

  m.def("instruction_set", [] { return kernels().name; });
  m.def("use_instruction_set", [](const char* name) {
    if (!use_kernels(name)) {
      throw std::invalid_argument(std::string("no kernels for instruction set '") + name +
                                  "' in this build or on this processor");
    }
  });
  m.def("use_openmp", use_openmp, py::arg("gomp_parallel"));
  m.def("offsets_are_valid", [](Address offsets, int64_t segments, int64_t rows, int64_t max_len) {
    return offsets_are_valid(at<const int32_t>(offsets), segments, rows, max_len);
  });

  m.def(
      "dropout",
      [](int threads, int dtype, Address input, Address out, int64_t rows, int64_t cols,
         Address rng_key, int64_t site, uint32_t threshold) {
        kernels().dropout(threads, static_cast<DType>(dtype), at<const void>(input), at<void>(out),
                          rows, cols, dropout_of(rng_key, site, threshold));
      },
      nogil);
  m.def(
      "activation_fwd",
      [](int threads, int dtype, int activation, Address pre, Address bias, Address out,
         int64_t rows, int64_t cols, Address rng_key, int64_t site, uint32_t threshold) {
        kernels().activation_fwd(threads, static_cast<DType>(dtype),
                                 static_cast<Activation>(activation), at<const void>(pre),
                                 at<const float>(bias), at<void>(out), rows, cols,
                                 dropout_of(rng_key, site, threshold));
      },
      nogil);
  m.def(
      "activation_bwd",
      [](int threads, int dtype, int activation, Address saved, Address bias, Address grad,
         Address grad_pre, Address bias_grad, int64_t rows, int64_t cols, Address rng_key,
         int64_t site, uint32_t threshold) {
        kernels().activation_bwd(
            threads, static_cast<DType>(dtype), static_cast<Activation>(activation),
            at<const void>(saved), at<const float>(bias), at<const void>(grad), at<void>(grad_pre),
            at<float>(bias_grad), rows, cols, dropout_of(rng_key, site, threshold));
      },
      nogil);
  m.def(
      "column_sum",
      [](int threads, int dtype, Address input, Address out, int64_t rows, int64_t cols) {
        kernels().column_sum(threads, static_cast<DType>(dtype), at<const void>(input),
                             at<float>(out), rows, cols);
      },
      nogil);
  m.def(
      "index_sum",
      [](int threads, int dtype, Address input, Address index, int64_t rows, int64_t cols,
         int64_t size, Address out) {
        kernels().index_sum(threads, static_cast<DType>(dtype), at<const void>(input),
                            at<const int32_t>(index), rows, cols, size, at<float>(out));
      },
      nogil);
  m.def(
      "transpose_sum",
      [](int threads, int dtype, Address input, int64_t rows, int64_t cols, Address out,
         int64_t stride, Address sums) {
        kernels().transpose_sum(threads, static_cast<DType>(dtype), at<const void>(input), rows,
                                cols, at<void>(out), stride, at<float>(sums));
      },
      nogil);
  m.def(
      "normalise_patches",
      [](int threads, int dtype, int64_t images, int64_t height, int64_t width, int64_t channels,
         int64_t patch_height, int64_t patch_width, Address pixels, Address mean, Address deviation,
         Address out, int64_t stride) {
        const PatchShape shape{images, height, width, channels, patch_height, patch_width};
        kernels().normalise_patches(threads, static_cast<DType>(dtype), shape,
                                    at<const uint8_t>(pixels), at<const float>(mean),
                                    at<const float>(deviation), at<void>(out), stride);
      },
      nogil);
  m.def(
      "standardise_rows",
      [](int threads, int dtype, Address input, Address mean, Address deviation, Address valid,
         int64_t rows, int64_t cols, Address out, int64_t stride) {
        kernels().standardise_rows(threads, static_cast<DType>(dtype), at<const float>(input),
                                   at<const float>(mean), at<const float>(deviation),
                                   at<const bool>(valid), rows, cols, at<void>(out), stride);
      },
      nogil);
  m.def(
      "add_position",
      [](int threads, int dtype, Address tokens, Address bias, Address position, Address index,
         int64_t period, int64_t size, int64_t rows, int64_t cols) {
        kernels().add_position(threads, static_cast<DType>(dtype), at<void>(tokens),
                               at<const float>(bias), at<const float>(position),
                               at<const int32_t>(index), period, size, rows, cols);
      },
      nogil);
  m.def(
      "add_layer_norm_fwd",
      [](int threads, int64_t rows, int64_t cols, int input_dtype, int residual_dtype, bool is_rms,
         Address input, Address residual, Address weight, Address bias, double eps, Address normed,
         Address summed, Address mean, Address rstd, Address rng_key, int64_t site,
         uint32_t threshold) {
        const NormShape shape{rows, cols, static_cast<DType>(input_dtype),
                              static_cast<DType>(residual_dtype), is_rms};
        kernels().add_layer_norm_fwd(threads, shape, at<const void>(input),
                                     at<const void>(residual), at<const float>(weight),
                                     at<const float>(bias), static_cast<float>(eps),
                                     at<void>(normed), at<void>(summed), at<float>(mean),
                                     at<float>(rstd), dropout_of(rng_key, site, threshold));
      },
      nogil);
  m.def(
      "add_layer_norm_bwd",
      [](int threads, int64_t rows, int64_t cols, int input_dtype, int residual_dtype, bool is_rms,
         Address grad_normed, Address grad_summed, Address input, Address residual, Address weight,
         Address mean, Address rstd, Address grad_input, Address grad_residual, Address grad_weight,
         Address grad_bias, Address rng_key, int64_t site, uint32_t threshold) {
        const NormShape shape{rows, cols, static_cast<DType>(input_dtype),
                              static_cast<DType>(residual_dtype), is_rms};
        kernels().add_layer_norm_bwd(
            threads, shape, at<const void>(grad_normed), at<const void>(grad_summed),
            at<const void>(input), at<const void>(residual), at<const float>(weight),
            at<const float>(mean), at<const float>(rstd), at<void>(grad_input),
            at<void>(grad_residual), at<float>(grad_weight), at<float>(grad_bias),
            dropout_of(rng_key, site, threshold));
      },
      nogil);
  m.def(
      "attention_fwd",
      [](int threads, Address offsets, int64_t segments, int64_t heads, int64_t head_dim,
         int64_t max_len, int64_t qkv_stride, bool is_causal, double scale, int dtype,
         Address query, Address key, Address value, Address out, Address lse, Address rng_key,
         int64_t site, uint32_t threshold) {
        kernels().attention_fwd(threads,
                                attention_shape(offsets, segments, heads, head_dim, max_len,
                                                qkv_stride, is_causal, scale, dtype),
                                at<const void>(query), at<const void>(key), at<const void>(value),
                                at<void>(out), at<float>(lse),
                                dropout_of(rng_key, site, threshold));
      },
      nogil);
  m.def(
      "attention_bwd",
      [](int threads, Address offsets, int64_t segments, int64_t heads, int64_t head_dim,
         int64_t max_len, int64_t qkv_stride, bool is_causal, double scale, int dtype,
         Address grad_out, Address query, Address key, Address value, Address lse,
         Address grad_query, Address grad_key, Address grad_value, int64_t grad_stride,
         Address rng_key, int64_t site, uint32_t threshold) {
        kernels().attention_bwd(threads,
                                attention_shape(offsets, segments, heads, head_dim, max_len,
                                                qkv_stride, is_causal, scale, dtype),
                                at<const void>(grad_out), at<const void>(query),
                                at<const void>(key), at<const void>(value), at<const float>(lse),
                                at<void>(grad_query), at<void>(grad_key), at<void>(grad_value),
                                grad_stride, dropout_of(rng_key, site, threshold));
      },
      nogil);
  m.def(
      "squared_error",
      [](int threads, int dtype, int64_t rows, int64_t cols, Address product, Address counts,
         Address bias_grad, Address totals, Address bias, int target_dtype, Address target) {
        kernels().squared_error(
            threads, loss_chunk(dtype, rows, cols, product, counts, bias_grad, totals),
            at<const float>(bias), static_cast<DType>(target_dtype), at<const void>(target));
      },
      nogil);
  m.def(
      "narrow_squared_error",
      [](int threads, int dtype, int target_dtype, int64_t rows, int64_t width, int64_t features,
         Address hidden, Address weight, Address bias, Address target, Address counts,
         Address grad_hidden, Address grad_weight, Address grad_bias, Address totals) {
        kernels().narrow_squared_error(
            threads,
            {rows, width, features, static_cast<DType>(dtype), static_cast<DType>(target_dtype),
             at<const void>(hidden), at<const void>(weight), at<const float>(bias),
             at<const void>(target), at<const uint8_t>(counts), at<void>(grad_hidden),
             at<float>(grad_weight), at<float>(grad_bias), at<double>(totals)});
      },
      nogil);
  m.def(
      "cross_entropy",
      [](int threads, int dtype, int64_t rows, int64_t cols, Address product, Address counts,
         Address bias_grad, Address totals, Address bias, bool ids_are_64_bit, Address ids) {
        kernels().cross_entropy(threads,
                                loss_chunk(dtype, rows, cols, product, counts, bias_grad, totals),
                                at<const float>(bias), ids_are_64_bit, at<const void>(ids));
      },
      nogil);
  m.def(
      "segment_mean_fwd",
      [](int threads, int dtype, Address input, Address offsets, int64_t segments, int64_t cols,
         Address out) {
        kernels().segment_mean_fwd(threads, static_cast<DType>(dtype), at<const void>(input),
                                   at<const int32_t>(offsets), segments, cols, at<void>(out));
      },
      nogil);
  m.def(
      "segment_mean_bwd",
      [](int threads, int dtype, Address grad_out, Address offsets, int64_t segments, int64_t cols,
         Address grad_input) {
        kernels().segment_mean_bwd(threads, static_cast<DType>(dtype), at<const void>(grad_out),
                                   at<const int32_t>(offsets), segments, cols,
                                   at<void>(grad_input));
      },
      nogil);
  m.def("train_heads", train_heads);
  m.def("test_heads", test_heads);
  m.def("has_weight_gradient", [] { return kernels().has_weight_gradient(); });
  m.def(
      "weight_gradient",
      [](int threads, Address grad, Address input, int64_t rows, int64_t grad_cols,
         int64_t input_cols, Address out) {
        kernels().weight_gradient(threads, at<const void>(grad), at<const void>(input), rows,
                                  grad_cols, input_cols, at<float>(out));
      },
      nogil);
  m.def(
      "text_stem_fwd",
      [](int threads, int64_t rows, int64_t cols, int weight_dtype, int position_dtype,
         int out_dtype, Address ids, Address weight, Address position, Address position_index,
         int64_t positions, Address out) {
        const TextShape shape{rows,
                              cols,
                              positions,
                              static_cast<DType>(weight_dtype),
                              static_cast<DType>(position_dtype),
                              static_cast<DType>(out_dtype)};
        kernels().text_stem_fwd(threads, shape, at<const int32_t>(ids), at<const void>(weight),
                                at<const void>(position), at<const int32_t>(position_index),
                                at<void>(out));
      },
      nogil);
  m.def(
      "log_mel",
      [](int threads, int64_t rows, int64_t row_samples, int64_t frames, int64_t window,
         int64_t mels, bool is_int16, int out_dtype, double floor, Address taper, int64_t points,
         int64_t passes, int64_t largest_radix, Address radices, Address place, Address fft_table,
         Address split, Address band_first, Address band_start, Address filters, Address mean,
         Address deviation, Address samples, Address continues, Address out) {
        const MelPlan plan{
            .row_samples = row_samples,
            .frames = frames,
            .window = window,
            .mels = mels,
            .is_int16 = is_int16,
            .out = static_cast<DType>(out_dtype),
            .floor = static_cast<float>(floor),
            .taper = at<const float>(taper),
            .points = points,
            .passes = passes,
            .largest_radix = largest_radix,
            .radices = at<const int32_t>(radices),
            .place = at<const int32_t>(place),
            .fft_table = at<const float>(fft_table),
            .split = at<const float>(split),
            .band_first = at<const int32_t>(band_first),
            .band_start = at<const int32_t>(band_start),
            .filters = at<const float>(filters),
            .mean = at<const float>(mean),
            .deviation = at<const float>(deviation),
        };
        kernels().log_mel(threads, plan, at<const void>(samples), at<const bool>(continues), rows,
                          at<void>(out));
      },
      nogil);
}
