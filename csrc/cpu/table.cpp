// The table of the kernels compiled for one instruction set.
#include "kernel_parts.h"

#define UML_TEXT_(x) #x
#define UML_TEXT(x) UML_TEXT_(x)

namespace uml::UML_ARCH {

extern const Kernels kernel_table;
const Kernels kernel_table = {
    .name = UML_TEXT(UML_ARCH),
    .dropout = dropout,
    .activation_fwd = activation_fwd,
    .activation_bwd = activation_bwd,
    .column_sum = column_sum,
    .index_sum = index_sum,
    .transpose_sum = transpose_sum,
    .has_weight_gradient = has_weight_gradient,
    .weight_gradient = weight_gradient,
    .normalise_patches = normalise_patches,
    .standardise_rows = standardise_rows,
    .add_position = add_position,
    .add_layer_norm_fwd = add_layer_norm_fwd,
    .add_layer_norm_bwd = add_layer_norm_bwd,
    .attention_fwd = attention_fwd,
    .attention_bwd = attention_bwd,
    .squared_error = squared_error,
    .narrow_squared_error = narrow_squared_error,
    .cross_entropy = cross_entropy,
    .segment_mean_fwd = segment_mean_fwd,
    .segment_mean_bwd = segment_mean_bwd,
    .text_stem_fwd = text_stem_fwd,
    .log_mel = log_mel,
    .train_heads = train_heads,
    .test_heads = test_heads,
    .read_jpegs = read_jpegs,
};

}  // namespace uml::UML_ARCH
