// Parts of an image in the cache, widened: what the attentions keep between their filters.
#pragma once

#include <vector>

#include "depthwise_tile.h"

namespace fastfusion::FF_CAPABILITY {

// `rows` x `columns` of `channels` channels, along the columns (C, rows, columns) or across the
// channels (rows, columns, C). Image row r lies in row r modulo `rows`, so that a slab can follow a
// filter down the image; image column c lies in column c - first_column.
template <typename A>
class Slab {
 public:
  Slab(bool across, int64_t channels, int64_t rows, int64_t columns)
      : rows_(rows),
        step_(across ? round_up(channels, kLanes<A>) : 1),
        row_step_(across ? columns * step_ : round_up(columns, kLanes<A>) + kLanes<A>),
        channel_step_(across ? 1 : rows * row_step_),
        size_((across ? 1 : channels) * rows * row_step_),
        data_(size_) {}

  int64_t first_column = 0;

  void clear() { std::fill_n(data_.get(), size_, A(0)); }
  A* at(int64_t channel, int64_t row, int64_t column) const {
    return &data_[channel * channel_step_ + row % rows_ * row_step_ +
                  (column - first_column) * step_];
  }
  int64_t step() const { return step_; }  // from a column to the next
  int64_t row_step() const { return row_step_; }
  int64_t channel_step() const { return channel_step_; }

 private:
  int64_t rows_, step_, row_step_, channel_step_, size_;
  Buffer<A> data_;
};

// Rows first .. last - 1 and columns begin .. end - 1 of the slab's channels, the first of which is
// `channel`: a copy of x with zeros beyond its left and right edge. Rows outside of x are left out.
template <typename T, typename A>
void copy_into(const Slab<A>& slab, bool across, const Image& x, int64_t b, int64_t channel,
               int64_t channels, int64_t first, int64_t last, int64_t begin, int64_t end) {
  for (int64_t row = std::max<int64_t>(0, first); row < std::min(last, x.rows); ++row) {
    if (across) {
      copy_pixels<T>(x, b, channel, channels, row, begin, end - begin, slab.at(0, row, begin),
                     slab.step());
    } else {
      for (int64_t c = 0; c < channels; ++c)
        copy_columns<T>(x, b, channel + c, row, begin, end - begin, slab.at(c, row, begin));
    }
  }
}

// Convolve rows first .. last - 1 and columns begin .. end - 1, which must lie in one piece in
// `to`. `channel` is the filter's for the slabs' first; `image_rows` those of the image.
template <typename A>
void convolve_slab(const Filter<A>& filter, int64_t channel, int64_t channels, const Slab<A>& from,
                   int64_t image_rows, const Slab<A>& to, int64_t first, int64_t last,
                   int64_t begin, int64_t end, std::vector<const A*>& input) {
  const int64_t dilation = filter.shape.row_dilation;
  for (int64_t c = 0; c < (filter.across ? 1 : channels); ++c) {
    for (int64_t start = first; start < std::min(last, first + dilation); ++start) {
      const int64_t count = (last - start + dilation - 1) / dilation;
      input.resize(count + filter.shape.rows - 1);
      for (int64_t i = 0; i < static_cast<int64_t>(input.size()); ++i) {
        const int64_t row = start - filter.shape.row_padding() + i * dilation;
        input[i] = row < 0 || row >= image_rows
                       ? nullptr
                       : from.at(c, row, begin - filter.shape.column_padding());
      }
      convolve(
          filter, channel + c,
          Piece<A>{input.data(), count, end - begin, from.step(), to.step(), to.at(c, start, begin),
                   to.row_step() * dilation, filter.across ? channels : 1});
    }
  }
}

}  // namespace fastfusion::FF_CAPABILITY
