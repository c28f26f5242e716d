// Entry points of the frequency filter: what lies between the transforms, and the circular form.
//
// All tensors are contiguous, float or double (`is_double`).
#pragma once

#include <cstdint>

#include "capability.h"
#include "types.h"

namespace fastfusion {

// A plane of an image; its half spectrum has `bins` columns.
struct SpectrumShape {
  int64_t rows, columns;
  int64_t bins() const { return columns / 2 + 1; }
  int64_t pairs() const { return (rows + 1) / 2; }
};

struct MixingShape {
  int64_t batch, filters, channels, pixels;
};

// The image's size, and that of the filters (2, C, size, size).
struct CircularShape {
  int64_t batch, channels, rows, columns, filter;
  // Rows of the upper half, which stand for all: row h and row -h hold each other's mirror image.
  int64_t half() const { return rows / 2 + 1; }
};

// What is constant in the spectrum, (2, C) each or null: added before and after the filters.
struct CircularBiases {
  const void* mixing;
  const void* last;
};

}  // namespace fastfusion

// mixing (2, filters, channels) times the parts (batch, 2, channels, pixels), plus a bias (2,
// filters) or null: the mixed parts (batch, 2, filters, pixels).
FF_DECLARE(void mix_parts(bool is_double, const MixingShape& shape, const void* mixing,
                          const void* bias, const void* parts, void* mixed))

// A plane's spectrum (rows, bins, 2) to its parts (rows, bins). Column 0 and, of an even number of
// columns, the last one are multiplied by `edge`, the others, which stand for two, by `inner`.
FF_DECLARE(void spectrum_parts(bool is_double, const SpectrumShape& shape, const void* spectrum,
                               double edge, double inner, void* real, void* imag))
// A plane's parts to its spectrum, times the same.
FF_DECLARE(void spectrum_of_parts(bool is_double, const SpectrumShape& shape, const void* real,
                                  const void* imag, double edge, double inner, void* spectrum))
// A plane's spectrum to whole rows (pairs, columns, 2), each that of one row of the image plus i
// times that of the next; the imaginary parts of the edge columns count as 0.
FF_DECLARE(void spectrum_pairs(bool is_double, const SpectrumShape& shape, const void* spectrum,
                               void* pairs))
// Their transform (pairs, columns, 2) to the rows of the image.
FF_DECLARE(void paired_rows(bool is_double, const SpectrumShape& shape, const void* pairs,
                            void* image))

// The gradients (2, C) of constants added to the real and to the imaginary parts, from that of the
// image (B, C, rows, columns): a constant is an impulse response in row 0.
FF_DECLARE(void constant_gradients(bool is_double, const SpectrumShape& shape, int64_t batch,
                                   int64_t channels, const void* grad, void* constants))

// The whole circular filter in one pass: x (B, inputs, rows, columns) and y (B, channels, rows,
// columns) are of `type`, all else of what it is computed in.
FF_DECLARE(void circular_filter(Type type, const CircularShape& shape, int64_t inputs,
                                const void* x, const void* mixing, const void* filters,
                                const CircularBiases& biases, void* y))
// For the gradients, step by step.
// The parts of x (B, C, rows, columns) that are even and odd under n -> -n, in its upper half: (B,
// 2, C, half, columns). Rows that stand for two are multiplied by `weight`.
FF_DECLARE(void circular_fold(bool is_double, const CircularShape& shape, const void* x,
                              double weight, void* parts))
// Back: their sum.
FF_DECLARE(void circular_unfold(bool is_double, const CircularShape& shape, const void* parts,
                                void* x))
// The gradients of the mixed parts and of the filters, from that of y.
FF_DECLARE(void circular_windows_backward(bool is_double, const CircularShape& shape,
                                          const void* grad, const void* parts, const void* filters,
                                          const void* mixing_bias, void* grad_parts,
                                          void* grad_filters))
