// Entry points of the kernels compiled for one instruction set; see kernels.h for what they do.
#pragma once

#include "kernels.h"

namespace uml::UML_ARCH {

void dropout(int threads, DType, const void* input, void* out, int64_t rows, int64_t cols, Dropout);
void activation_fwd(int threads, DType, Activation, const void* pre, const float* bias, void* out,
                    int64_t rows, int64_t cols, Dropout);
void activation_bwd(int threads, DType, Activation, const void* saved, const float* bias,
                    const void* grad, void* grad_pre, float* bias_grad, int64_t rows, int64_t cols,
                    Dropout);
void column_sum(int threads, DType, const void* input, float* out, int64_t rows, int64_t cols);
void index_sum(int threads, DType, const void* input, const int32_t* index, int64_t rows,
               int64_t cols, int64_t size, float* out);
void transpose_sum(int threads, DType, const void* input, int64_t rows, int64_t cols, void* out,
                   int64_t stride, float* sums);
bool has_weight_gradient();
void weight_gradient(int threads, const void* grad, const void* input, int64_t rows,
                     int64_t grad_cols, int64_t input_cols, float* out);
void normalise_patches(int threads, DType, PatchShape, const uint8_t* pixels, const float* mean,
                       const float* deviation, void* out, int64_t stride);
void standardise_rows(int threads, DType, const float* input, const float* mean,
                      const float* deviation, const bool* valid, int64_t rows, int64_t cols,
                      void* out, int64_t stride);
void add_position(int threads, DType, void* tokens, const float* bias, const float* position,
                  const int32_t* index, int64_t period, int64_t size, int64_t rows, int64_t cols);
void add_layer_norm_fwd(int threads, NormShape, const void* input, const void* residual,
                        const float* weight, const float* bias, float eps, void* normed,
                        void* summed, float* mean, float* rstd, Dropout);
void add_layer_norm_bwd(int threads, NormShape, const void* grad_normed, const void* grad_summed,
                        const void* input, const void* residual, const float* weight,
                        const float* mean, const float* rstd, void* grad_input, void* grad_residual,
                        float* grad_weight, float* grad_bias, Dropout);
void attention_fwd(int threads, AttentionShape, const void* query, const void* key,
                   const void* value, void* out, float* lse, Dropout);
void attention_bwd(int threads, AttentionShape, const void* grad_out, const void* query,
                   const void* key, const void* value, const float* lse, void* grad_query,
                   void* grad_key, void* grad_value, int64_t grad_stride, Dropout);
void squared_error(int threads, LossChunk, const float* bias, DType target_dtype,
                   const void* target);
void narrow_squared_error(int threads, const NarrowLoss& loss);
void cross_entropy(int threads, LossChunk, const float* bias, bool ids_are_64_bit, const void* ids);
void segment_mean_fwd(int threads, DType, const void* input, const int32_t* offsets,
                      int64_t segments, int64_t cols, void* out);
void segment_mean_bwd(int threads, DType, const void* grad_out, const int32_t* offsets,
                      int64_t segments, int64_t cols, void* grad_input);
void text_stem_fwd(int threads, TextShape shape, const int32_t* ids, const void* weight,
                   const void* position, const int32_t* position_index, void* out);
void log_mel(int threads, const MelPlan& plan, const void* samples, const bool* continues,
             int64_t rows, void* out);
void train_heads(int threads, const HeadGrid& grid, HeadCell* cells, int64_t count);
void test_heads(int threads, const HeadSource& source, int64_t samples, int64_t classes,
                const float* const* folded, int64_t count, int64_t* right);
// The steps of one cell with products of bf16 halves; where the instruction set has matrix tiles.
void train_cell_in_halves(const HeadGrid& grid, const HeadCell& cell);
int64_t read_jpegs(const JpegBatch& batch, PatchShape shape, uint8_t* out, bool* is_read);

// out[c] = sum over chunks of partial[chunk][c], in chunk order.
void sum_partials(int threads, const float* partial, int64_t chunks, int64_t cols, float* out);

}  // namespace uml::UML_ARCH
