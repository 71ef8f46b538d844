// Log-mel features of waveforms. Each lane of a vector is one frame: kWidth frames are windowed,
// transformed by one mixed-radix FFT of scalar code, squared, summed to mel bands and stored, all
// in the first-level cache.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

constexpr int kGroupsPerChunk = 4;

UML_INLINE Vec load_samples(const float* p) { return load(p); }
UML_INLINE Vec load_samples(const int16_t* p) {
  typedef int16_t VecS __attribute__((vector_size(2 * kWidth)));
  VecS v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec);
}

// The first `n` samples; silence behind them.
template <class S>
UML_INLINE Vec load_samples(const S* p, int64_t n) {
  if (n >= kWidth) return load_samples(p);
  S buffer[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load_samples(buffer);
}

// A complex number of each lane.
struct Complex {
  Vec re, im;
};

UML_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
UML_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
UML_INLINE Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// -i * a
UML_INLINE Complex turn(Complex a) { return {a.im, -a.re}; }
UML_INLINE Complex splat_complex(const float* p) { return {splat(p[0]), splat(p[1])}; }
UML_INLINE Complex load_complex(const float* p) { return {load(p), load(p + kWidth)}; }
UML_INLINE void store_complex(float* p, Complex a) {
  store(p, a.re);
  store(p + kWidth, a.im);
}

constexpr int64_t kComplex = 2 * kWidth;  // floats of a Complex

UML_INLINE void butterfly_2(Complex* a) {
  const Complex b = a[1];
  a[1] = a[0] - b;
  a[0] = a[0] + b;
}

UML_INLINE void butterfly_4(Complex* a) {
  const Complex even = a[0] + a[2], odd = a[1] + a[3];
  const Complex left = a[0] - a[2], right = turn(a[1] - a[3]);
  a[0] = even + odd;
  a[1] = left + right;
  a[2] = even - odd;
  a[3] = left - right;
}

// DFT of an odd number of values: sums and differences of a[q] and a[radix - q] halve the products.
// `circle` has cosine and sine of 2 pi i / radix; `fold` room for radix values.
UML_INLINE void butterfly_odd(int radix, const float* circle, Complex* a, Complex* fold) {
  const int half = radix / 2;
  const Complex first = a[0];
  Complex total = first;
#pragma GCC unroll 4
  for (int q = 1; q <= half; ++q) {
    fold[q] = a[q] + a[radix - q];
    fold[radix - q] = a[q] - a[radix - q];
    total = total + fold[q];
  }
  a[0] = total;
#pragma GCC unroll 4
  for (int k = 1; k <= half; ++k) {
    Complex even = first, odd = {};
    int at = 0;
#pragma GCC unroll 4
    for (int q = 1; q <= half; ++q) {
      at += k;
      if (at >= radix) at -= radix;
      const Complex t = fold[q], u = fold[radix - q];
      const Vec c = splat(circle[2 * at]), s = splat(circle[2 * at + 1]);
      even = {even.re + t.re * c, even.im + t.im * c};
      odd = {odd.re + u.re * s, odd.im + u.im * s};
    }
    odd = turn(odd);
    a[k] = even + odd;
    a[radix - k] = even - odd;
  }
}

// One pass of the FFT: `points / (radix * length)` groups of `radix` transforms of `length` points
// become one each. kRadix 0: any odd radix, with `room` for 2 * radix values.
template <int kRadix>
void pass(float* data, int64_t points, int64_t length, int radix, const float* circle,
          const float* twiddles, Complex* room) {
  Complex local[2 * (kRadix ? kRadix : 1)];
  Complex* const a = kRadix ? local : room;
  const int r = kRadix ? kRadix : radix;
  for (int64_t j = 0; j < length; ++j) {
    const float* twiddle = twiddles + 2 * (r - 1) * j;
    for (int64_t base = j; base < points; base += r * length) {
#pragma GCC unroll 8
      for (int q = 0; q < r; ++q) {
        a[q] = load_complex(data + (base + q * length) * kComplex);
        if (q > 0 && length > 1) a[q] = a[q] * splat_complex(twiddle + 2 * (q - 1));
      }
      if constexpr (kRadix == 2) {
        butterfly_2(a);
      } else if constexpr (kRadix == 4) {
        butterfly_4(a);
      } else {
        butterfly_odd(r, circle, a, a + r);
      }
#pragma GCC unroll 8
      for (int q = 0; q < r; ++q) store_complex(data + (base + q * length) * kComplex, a[q]);
    }
  }
}

// In-place FFT of digit-reversed input; the table holds for each pass the circle of its radix, then
// its twiddle factors.
void transform(const MelPlan& plan, float* data, Complex* room) {
  const float* table = plan.fft_table;
  int64_t length = 1;
  for (int64_t i = 0; i < plan.passes; ++i) {
    const int radix = plan.radices[i];
    const float* twiddles = table + 2 * radix;
    auto* const run = radix == 2   ? pass<2>
                      : radix == 3 ? pass<3>
                      : radix == 4 ? pass<4>
                      : radix == 5 ? pass<5>
                      : radix == 7 ? pass<7>
                                   : pass<0>;
    run(data, plan.points, length, radix, table, twiddles, room);
    table = twiddles + 2 * (radix - 1) * length;
    length *= radix;
  }
}

// Windowed samples of the frames in the lanes, digit-reversed. Even windows: pairs of samples make
// complex points; odd ones: a sample makes a real point.
template <class S>
void gather(const MelPlan& plan, const S* const* start, const int64_t* valid, float* data) {
  const bool pairs = plan.window % 2 == 0;
  for (int64_t n = 0; n < plan.window; n += kWidth) {
    Vec v[kWidth];
    for (int lane = 0; lane < kWidth; ++lane)
      v[lane] = load_samples(start[lane] + n, valid[lane] - n);
    transpose(v);
    const int64_t here = smaller(kWidth, plan.window - n);
    for (int64_t i = 0; i < here; ++i) {
      const int64_t sample = n + i;
      const Vec x = v[i] * plan.taper[sample];
      if (pairs) {
        store(data + plan.place[sample / 2] * kComplex + sample % 2 * kWidth, x);
      } else {
        store_complex(data + plan.place[sample] * kComplex, Complex{x, Vec{}});
      }
    }
  }
}

// Power of bins 0..window / 2; four times that for even windows.
void spectrum(const MelPlan& plan, const float* data, float* power) {
  if (plan.window % 2) {
    for (int64_t k = 0; k <= plan.window / 2; ++k) {
      const Complex z = load_complex(data + k * kComplex);
      store(power + k * kWidth, z.re * z.re + z.im * z.im);
    }
    return;
  }
  // z = even + i * odd of the transforms of even and odd samples
  const int64_t half = plan.points;
  for (int64_t k = 0; k <= half / 2; ++k) {
    const Complex z = load_complex(data + k * kComplex);
    const Complex y = load_complex(data + (k ? half - k : 0) * kComplex);
    const Complex even = {z.re + y.re, z.im - y.im};
    const Complex odd = Complex{z.im + y.im, y.re - z.re} * splat_complex(plan.split + 2 * k);
    const Complex low = even + odd, high = even - odd;
    store(power + k * kWidth, low.re * low.re + low.im * low.im);
    store(power + (half - k) * kWidth, high.re * high.re + high.im * high.im);
  }
}

// Bands of frames [frame, frame + count).
template <class T>
void store_bands(const MelPlan& plan, const float* power, T* out, int64_t frame, int64_t count) {
  for (int64_t band = 0; band < plan.mels; band += kWidth) {
    Vec v[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t b = smaller(band + i, plan.mels - 1);
      Vec total{};
      const float* bins = power + plan.band_first[b] * kWidth;
      for (int64_t w = plan.band_start[b]; w < plan.band_start[b + 1]; ++w, bins += kWidth)
        total += load(bins) * plan.filters[w];
      v[i] = (log(total + plan.floor) - plan.mean[b]) / plan.deviation[b];
    }
    transpose(v);
    for (int64_t lane = 0; lane < count; ++lane)
      store_n(out + (frame + lane) * plan.mels + band, v[lane], plan.mels - band);
  }
}

}  // namespace

void log_mel(int threads, const MelPlan& plan, const void* samples, const bool* continues,
             int64_t rows, void* out) {
  const int64_t hop = plan.row_samples / plan.frames, frames = rows * plan.frames;
  const int64_t bins = plan.window / 2 + 1;
  auto run = [&]<class S, class T>(const S* input, T* output) {
    parallel_for(threads, frames, kGroupsPerChunk * kWidth, [&](int64_t begin, int64_t end) {
      float* const data = thread_scratch(plan.points * kComplex + bins * kWidth +
                                         2 * plan.largest_radix * kComplex);
      float* const power = data + plan.points * kComplex;
      Complex* const room = reinterpret_cast<Complex*>(power + bins * kWidth);
      for (int64_t frame = begin; frame < end; frame += kWidth) {
        const int64_t count = smaller(kWidth, end - frame);
        const S* start[kWidth];
        int64_t valid[kWidth];
        for (int64_t lane = 0; lane < kWidth; ++lane) {
          const int64_t row = (frame + lane) / plan.frames;
          const int64_t offset = (frame + lane) % plan.frames * hop;
          const bool is_dead = lane >= count;
          // a window ends in the next row at the latest, and rows of a sound lie one after another
          const bool goes_on = !is_dead && row + 1 < rows && continues[row];
          start[lane] = is_dead ? input : input + row * plan.row_samples + offset;
          valid[lane] = is_dead ? 0 : goes_on ? plan.window : plan.row_samples - offset;
        }
        gather(plan, start, valid, data);
        transform(plan, data, room);
        spectrum(plan, data, power);
        store_bands(plan, power, output, frame, count);
      }
    });
  };
  with_type(plan.out, [&]<class T>(T*) {
    if (plan.is_int16) {
      run(static_cast<const int16_t*>(samples), static_cast<T*>(out));
    } else {
      run(static_cast<const float*>(samples), static_cast<T*>(out));
    }
  });
}

}  // namespace uml::UML_ARCH
