// Entry points of the transforms between an image and the parts of its half spectrum.
#pragma once

#include "depthwise.h"
#include "frequency_filter.h"
#include "types.h"

// Whether the planes' sizes are among those that the transforms here take.
FF_DECLARE(bool takes_spectrum(const SpectrumShape& shape))
// An image (batch, channels, rows, columns), contiguous and of the given type, to the parts of its
// half spectrum (batch, 2, channels, rows, bins), of float, or double. Column 0 and, of an even
// number of columns, the last one are multiplied by `edge`, the others, which stand for two, by
// `inner`. False where not all of the image is finite: two rows share a transform here, and the
// reference's does not carry NaN from one to the other.
FF_DECLARE(bool spectrum_of_image(Type type, const SpectrumShape& shape, int64_t batch,
                                  int64_t channels, const void* image, double edge, double inner,
                                  void* parts))
// Back, unscaled but for the same two factors: along the columns as complex numbers, then along the
// rows with the imaginary parts of the edge columns as 0. Where `filter`, of 2 channels for each of
// the image's, is given, each part is filtered on the way.
FF_DECLARE(void image_of_spectrum(Type type, const SpectrumShape& shape, int64_t batch,
                                  int64_t channels, const void* parts, const FilterView* filter,
                                  double edge, double inner, void* image))
