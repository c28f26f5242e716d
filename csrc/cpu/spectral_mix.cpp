// SpeCAM's mixture of both bands on the CPU: split, two depthwise 3x3 convolutions, GELU and the
// weighted sum in one pass over the image, of which only the sum is written.
#include <vector>

#include "gelu.h"
#include "parallel.h"
#include "spectral_tile.h"
#include "stream.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// The sums of a pair of rows of a strip. In NCHW the low band comes with even and odd columns
// apart: they are kept so, and joined when the pair is complete.
template <typename T, bool planar>
class PairSums {
 public:
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int64_t kLane = kLanes<A>;

  PairSums() : low_(2 * kRoom), high_(2 * kRoom), row_(kRoom), scratch_(planar ? kRoom : kLane) {}

  FF_INLINE void add(Band band, int row, int64_t column, V value) {
    if constexpr (planar) {
      if (band == kLow)
        store(low_.data() + row * kRoom + column % 2 * kOdd + column / 2, value);
      else
        store(high_.data() + row * kRoom + column, value);
    } else {
      A* at = low_.data() + row * kRoom + column * kLane;
      store(at, band == kLow ? value : load(at) + value);
    }
  }

  // Write `columns` columns of row `row`; of NHWC the `channels` first lanes.
  FF_INLINE void write(const Image& y, T* to, int row, int64_t columns, int channels,
                       bool streaming) {
    if constexpr (planar) {
      const A *even = low_.data() + row * kRoom, *odd = even + kOdd;
      const A* high = high_.data() + row * kRoom;
      A* joined = row_.data();
      for (int64_t i = 0; 2 * i < columns; i += kLane) {
        const auto low =
            interleave(Pair<V>{load(even + i), load(odd + i)}, std::make_index_sequence<kLane>());
        store(joined + 2 * i, low.left + load(high + 2 * i));
        store(joined + 2 * i + kLane, low.right + load(high + 2 * i + kLane));
      }
      write_row(to, joined, columns, streaming, scratch_.data());
    } else {
      for (int64_t column = 0; column < columns; ++column) {
        const V sum = load(low_.data() + row * kRoom + column * kLane);
        if (std::is_same_v<T, A> && streaming)
          stream(to + column * y.column_stride, sum);
        else if (channels == kLane)
          store(to + column * y.column_stride, sum);
        else
          store(to + column * y.column_stride, sum, channels);
      }
    }
  }

 private:
  // A row of a strip, and as much more as vectors may reach beyond it.
  static constexpr int64_t kOdd = kStripColumns<planar> / 2 + 2 * kLane;
  static constexpr int64_t kRoom = planar ? 2 * kOdd : kStripColumns<planar> * kLane;
  Zeros<A> low_, high_, row_;
  std::vector<T> scratch_;
};

template <typename T, bool planar>
void mix(const Image& x, const SpectralFilters& raw, const T* const* gates, const Image& y) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int64_t width = kStripColumns<planar>, lanes = planar ? 1 : kLanes<A>;
  const int64_t groups = (x.channels + lanes - 1) / lanes;
  const int64_t strips = (x.columns + width - 1) / width;
  const int64_t size = x.batch * x.channels * x.rows * x.columns;
  // Rows are copied past the caches wherever they lie; pixels must be whole vectors.
  const auto whole = [](int64_t stride) { return stride % kLanes<A> == 0; };
  const bool streaming =
      should_stream<T>(size) &&
      (planar || (reinterpret_cast<uintptr_t>(y.data) % kVectorBytes == 0 && whole(x.channels) &&
                  whole(y.batch_stride) && whole(y.row_stride) && whole(y.column_stride)));
  const Filters<T> filters{raw};
  parallel_for(0, x.batch * groups * strips, 1, [&](int64_t begin, int64_t end) {
    PairSums<T, planar> sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % strips * width, channel = task / strips % groups * lanes;
      const int64_t b = task / strips / groups;
      const int count = static_cast<int>(std::min(lanes, x.channels - channel));
      const TileFilters<T> tile_filters(filters, channel, x.channels - channel, planar);
      V gate[2] = {};  // the half of each
      for (Band band : {kLow, kHigh})
        for (int lane = 0; lane < kLanes<A>; ++lane)
          if (planar || lane < count)
            gate[band][lane] =
                A(0.5) * widen(gates[band][b * x.channels + channel + (planar ? 0 : lane)]);
      const int64_t columns = std::min(width, x.columns - first);
      Tile<T, planar> tile(x, tile_filters, b, channel, first);
      tile.walk(
          0, (x.rows + 1) / 2,
          [&](Band band, int row, int64_t column, int, V p, int64_t)
              FF_INLINED { sums.add(band, row, column, gated_gelu(p, gate[band])); },
          [&](int64_t pair) FF_INLINED {
            for (int row = 0; row < 2 && 2 * pair + row < x.rows; ++row)
              sums.write(y, y.at<T>(b, channel, 2 * pair + row, first), row, columns, count,
                         streaming);
          });
    }
    stream_fence();
  });
}

}  // namespace

void spectral_mix(Type type, bool planar, const Image& x, const SpectralFilters& filters,
                  const void* const* gates, const Image& y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* const typed[2] = {static_cast<const T*>(gates[0]), static_cast<const T*>(gates[1])};
    if (planar)
      mix<T, true>(x, filters, typed, y);
    else
      mix<T, false>(x, filters, typed, y);
  });
}

}  // namespace fastfusion::FF_CAPABILITY
