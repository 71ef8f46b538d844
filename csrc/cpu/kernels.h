// The CPU kernels, one table of function pointers per instruction set. Raw pointers and sizes only.
//
// All matrices are row-major with contiguous last dimension; statistics, biases, norm weights and
// their gradients are fp32; arithmetic is fp32. Every result is independent of the number of
// threads. Callers check arguments.
#pragma once

#include <cstdint>

namespace uml {

enum class DType : int { f32 = 0, bf16 = 1 };
enum class Activation : int { relu = 0, gelu = 1, swiglu = 2 };

// Counter-based dropout of one site (uml_fast/kernels/rng.py). threshold 0: nothing drops.
struct Dropout {
  uint64_t key = 0;
  uint32_t threshold = 0;
  float scale = 1;
};

struct AttentionShape {
  const int32_t* offsets;  // segments + 1
  int64_t segments;
  int64_t heads;
  int64_t head_dim;
  int64_t max_len;     // columns of the dropout mask
  int64_t qkv_stride;  // elements between rows of query, key and value (and of their gradients)
  bool is_causal;
  float scale;
  DType dtype;
};

struct NormShape {
  int64_t rows;
  int64_t cols;
  DType input;     // input, normed and their gradients
  DType residual;  // residual, summed and their gradients
  bool is_rms;     // RMS norm: no mean, no bias and no gradient of it
};

// Some rows of the product of a linear layer, and where their error goes.
struct LossChunk {
  int64_t rows;
  int64_t cols;
  DType dtype;
  void* product;          // (rows, cols); becomes the gradient of the sum of errors
  const uint8_t* counts;  // (rows) whether a row counts; those that do not get gradient 0, unread
  float* bias_grad;       // (cols) column sums of the gradient are added; null: no gradient
  double* totals;         // the sum of errors and the number of rows that count are added
};

// A linear layer of few inputs and outputs, and its squared error.
struct NarrowLoss {
  int64_t rows;
  int64_t width;     // of hidden
  int64_t features;  // of the prediction
  DType dtype;       // hidden, weight (features, width) and grad_hidden
  DType target_dtype;
  const void* hidden;
  const void* weight;
  const float* bias;
  const void* target;
  const uint8_t* counts;  // as in LossChunk
  void* grad_hidden;      // gradients are of the sum of errors; null: not needed
  float* grad_weight;     // null: neither this nor grad_bias is needed
  float* grad_bias;
  double* totals;  // as in LossChunk
};

struct TextShape {
  int64_t rows;
  int64_t cols;
  int64_t positions;  // rows of the position table
  DType weight;
  DType position;
  DType out;
};

// How waveforms become log-mel features (uml_fast/kernels/native/log_mel.py makes the tables).
struct MelPlan {
  int64_t row_samples;
  int64_t frames;  // per row
  int64_t window;
  int64_t mels;
  bool is_int16;  // samples are int16, else fp32
  DType out;
  float floor;         // added to the power of a band
  const float* taper;  // window: factor of each sample
  int64_t points;      // complex points of the FFT: window / 2, or window if that is odd
  int64_t passes;      // of the FFT
  int64_t largest_radix;
  const int32_t* radices;     // passes
  const int32_t* place;       // points: where the FFT wants each point
  const float* fft_table;     // per pass: cosine and sine of 2 pi i / radix, then twiddle factors
  const float* split;         // window / 4 + 1 complex: e**(-2 pi i k / window)
  const int32_t* band_first;  // mels: first bin of a band
  const int32_t* band_start;  // mels + 1: its filter's first weight
  const float* filters;
  const float* mean;       // mels
  const float* deviation;  // mels
};

// uint8 images (images, height, width, channels), cut into patches in reading order.
struct PatchShape {
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
  int64_t patch_height;
  int64_t patch_width;
};

// Samples of one modality: rows of `width` floats, a multiple of 16, and their classes.
struct HeadSource {
  const float* rows;
  const int32_t* labels;
  int64_t width;
};

// What a cell sees of one modality.
struct HeadBranch {
  HeadSource source;
  const int32_t* order;  // (steps, batch) rows of the batches
  int64_t batch;
  float weight;       // of its loss
  bool is_projected;  // a projection leads from its features to the head
};

// One cell of a grid (uml_fast/grid/heads.py says how its parameters lie in memory).
struct HeadCell {
  float* weights;
  float* first;  // moments of AdamW
  float* second;
  const float* rates;  // (steps) learning rates
  int64_t begin;       // steps that were done before
  int64_t steps;
  float weight_decay;
  bool learns_scale;
  const HeadBranch* branches;  // the target first; the last one is not projected
  int64_t branch_count;
  float* folded;            // out: (target's width, classes) the target's path as one matrix
  const int32_t* held_out;  // validation samples that are looked at after the steps
  int64_t held_out_count;
  int64_t right;  // out: how many of them the head gets right
};

// What all cells of a call share; classes of the head are padded to a multiple of 16 in memory.
struct HeadGrid {
  HeadSource validation;
  int64_t classes;
  bool may_halve;  // products of steps as three of bf16 halves, where the processor has AMX
};

// Where files lie: `sizes` bytes from `offsets` on in open files.
struct JpegBatch {
  int64_t count;
  const int32_t* descriptors;
  const int64_t* offsets;
  const int64_t* sizes;
};

struct Kernels {
  const char* name;

  // out = input * keep / (1 - p); out may be input.
  void (*dropout)(int threads, DType, const void* input, void* out, int64_t rows, int64_t cols,
                  Dropout);

  // out (rows, cols) = dropout(activation(pre + bias)). swiglu: pre (rows, 2 cols) and bias are the
  // gate, then the value; for the others out may be pre.
  void (*activation_fwd)(int threads, DType, Activation, const void* pre, const float* bias,
                         void* out, int64_t rows, int64_t cols, Dropout);
  // grad_pre is the gradient of pre, bias_grad its column sums. saved: out for relu, else pre.
  // Where pre and grad (rows, cols) have one shape, grad_pre may be grad.
  void (*activation_bwd)(int threads, DType, Activation, const void* saved, const float* bias,
                         const void* grad, void* grad_pre, float* bias_grad, int64_t rows,
                         int64_t cols, Dropout);

  // out[c] = sum over rows of input.
  void (*column_sum)(int threads, DType, const void* input, float* out, int64_t rows, int64_t cols);

  // out[p] = sum of the rows of input whose index is p, for size entries; indices beyond them are
  // clamped.
  void (*index_sum)(int threads, DType, const void* input, const int32_t* index, int64_t rows,
                    int64_t cols, int64_t size, float* out);

  // out (cols, rows) = input transposed, `stride` elements between its rows, a multiple of 32 of
  // which those up to the next 32 are zeros; sums: the column sums of input.
  void (*transpose_sum)(int threads, DType, const void* input, int64_t rows, int64_t cols,
                        void* out, int64_t stride, float* sums);

  // Whether weight_gradient is there, or does nothing.
  bool (*has_weight_gradient)();
  // out (grad_cols, input_cols) = grad (rows, grad_cols)^T input (rows, input_cols), both bf16.
  void (*weight_gradient)(int threads, const void* grad, const void* input, int64_t rows,
                          int64_t grad_cols, int64_t input_cols, float* out);

  // out = (pixels / 255 - mean) / deviation, one row of `stride` elements a patch, zeros beyond the
  // patch's; mean and deviation per channel.
  void (*normalise_patches)(int threads, DType, PatchShape, const uint8_t* pixels,
                            const float* mean, const float* deviation, void* out, int64_t stride);
  // out = (input - mean) / deviation in rows of `stride` elements, zeros beyond cols and in rows
  // that are not valid; mean and deviation may be null, and valid.
  void (*standardise_rows)(int threads, DType, const float* input, const float* mean,
                           const float* deviation, const bool* valid, int64_t rows, int64_t cols,
                           void* out, int64_t stride);
  // tokens[row] += bias + position[index[row]], in place; index null: row modulo `period`. Indices
  // are clamped to the `size` entries.
  void (*add_position)(int threads, DType, void* tokens, const float* bias, const float* position,
                       const int32_t* index, int64_t period, int64_t size, int64_t rows,
                       int64_t cols);

  // summed = residual + dropout(input) (may be null), normed = layer norm of it; mean and rstd per
  // row.
  void (*add_layer_norm_fwd)(int threads, NormShape, const void* input, const void* residual,
                             const float* weight, const float* bias, float eps, void* normed,
                             void* summed, float* mean, float* rstd, Dropout);
  // grad_summed may be null; so may grad_input, where it is grad_residual (same dtype, no dropout).
  void (*add_layer_norm_bwd)(int threads, NormShape, const void* grad_normed,
                             const void* grad_summed, const void* input, const void* residual,
                             const float* weight, const float* mean, const float* rstd,
                             void* grad_input, void* grad_residual, float* grad_weight,
                             float* grad_bias, Dropout);

  // out (rows, heads, head_dim) contiguous; lse (rows, heads).
  void (*attention_fwd)(int threads, AttentionShape, const void* query, const void* key,
                        const void* value, void* out, float* lse, Dropout);
  void (*attention_bwd)(int threads, AttentionShape, const void* grad_out, const void* query,
                        const void* key, const void* value, const float* lse, void* grad_query,
                        void* grad_key, void* grad_value, int64_t grad_stride, Dropout);

  // Error of a row: its squared distance to target. product + bias is the prediction.
  void (*squared_error)(int threads, LossChunk, const float* bias, DType target_dtype,
                        const void* target);
  void (*narrow_squared_error)(int threads, const NarrowLoss&);
  // Error of a row: -log softmax(product + bias)[id]. ids of rows that count are in [0, cols).
  void (*cross_entropy)(int threads, LossChunk, const float* bias, bool ids_are_64_bit,
                        const void* ids);

  void (*segment_mean_fwd)(int threads, DType, const void* input, const int32_t* offsets,
                           int64_t segments, int64_t cols, void* out);
  void (*segment_mean_bwd)(int threads, DType, const void* grad_out, const int32_t* offsets,
                           int64_t segments, int64_t cols, void* grad_input);

  // out[r] = weight[ids[r]] + position[position_index[r], clamped]; position may be null.
  void (*text_stem_fwd)(int threads, TextShape, const int32_t* ids, const void* weight,
                        const void* position, const int32_t* position_index, void* out);

  // out (rows, frames * mels); continues[r]: row r + 1 is of the same sound.
  void (*log_mel)(int threads, const MelPlan&, const void* samples, const bool* continues,
                  int64_t rows, void* out);

  // The next steps of each cell.
  void (*train_heads)(int threads, const HeadGrid&, HeadCell* cells, int64_t count);
  // How many of the first samples of a source each of `count` folded matrices gets right.
  void (*test_heads)(int threads, const HeadSource&, int64_t samples, int64_t classes,
                     const float* const* folded, int64_t count, int64_t* right);

  // Plain JPEG files of the given size to patches; out: images in turn, each patch after patch of
  // (patch_height, patch_width, channels). Files that are anything else are left out, and is_read
  // says so. Returns how many were read.
  int64_t (*read_jpegs)(const JpegBatch&, PatchShape, uint8_t* out, bool* is_read);
};

// The kernels in use: the widest this processor runs, unless use_kernels chose others.
const Kernels& kernels();

// Uses the kernels of the instruction set called `name` from now on; false if this build or
// processor lacks them.
bool use_kernels(const char* name);

// True if offsets start at 0, never decrease, end at rows and no segment is longer than max_len.
bool offsets_are_valid(const int32_t* offsets, int64_t segments, int64_t rows, int64_t max_len);

// order = the segments, longest first, equal ones as they come.
void longest_first(const int32_t* offsets, int64_t segments, int32_t* order);

// The key of a dropout site (splitmix64 of the step's key).
uint64_t site_key(uint64_t rng_key, int64_t site);

}  // namespace uml
