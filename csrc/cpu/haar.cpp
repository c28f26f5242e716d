// Haar transforms on the CPU.
//
// The tile is a pair of rows, cut into pieces of at most kPiece elements: each is read once from
// memory, combined 2x2 block by 2x2 block in registers, collected in a buffer in the first-level
// cache, and written once from there (stream.h). Nothing else touches memory.
//
// A block `a b / c d` at an odd edge has no b, d or no c, d. Reading gives its neighbour again
// (the symmetric extension), or 0 in the adjoint of a crop; writing leaves it out, or adds it to
// its neighbour in the adjoint of the extension.
#include "haar.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "haar_blocks.h"
#include "parallel.h"
#include "stream.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Elements of a row that are handled at once: the buffers of a piece stay in the first-level cache.
constexpr int64_t kPiece = 2048;
// Elements of an image worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;

// -- pieces of rows -------------------------------------------------------------------------------

// The rows of an image as both layouts have them: `unit` elements make a pixel.
template <typename T, bool planar>
struct Rows {
  explicit Rows(const Image& image, bool streaming = false)
      : image(image),
        streaming(streaming),
        ahead(elements_ahead<T>(image.columns * unit(), image.row_stride)) {}
  const Image& image;
  const bool streaming;  // whether they are written past the caches
  const int64_t ahead;   // elements from a pair of rows to what will be read soon

  int64_t unit() const { return planar ? 1 : image.channels; }
  int64_t planes() const { return planar ? image.batch * image.channels : image.batch; }
  T* at(int64_t plane, int64_t row, int64_t pixel) const {
    const int64_t b = planar ? plane / image.channels : plane;
    const int64_t c = planar ? plane % image.channels : 0;
    return image.at<T>(b, c, row, pixel);
  }
};

template <typename T>
bool streams(const Image& image, int images) {
  return should_stream<T>(images * image.batch * image.channels * image.rows * image.columns);
}

// A piece of a pair of rows of an image: its place, its size and the buffers for its results.
template <typename T>
struct Piece {
  int64_t plane, pair, pixel, pixels;
  bool has_below;  // the pair has a second row
  Accumulator<T>* out[4];
  T* scratch;

  int64_t above() const { return 2 * pair; }
  int64_t below() const { return 2 * pair + has_below; }

  template <bool planar>
  void write_image(const Rows<T, planar>& to, int64_t row, const Accumulator<T>* from) const {
    write_row(to.at(plane, row, pixel), from, pixels * to.unit(), to.streaming, scratch);
  }
  template <bool planar>
  void write_band(const Rows<T, planar>& to, const Accumulator<T>* from) const {
    write_row(to.at(plane, pair, pixel / 2), from, (pixels + 1) / 2 * to.unit(), to.streaming,
              scratch);
  }
};

// Call f(piece) for all pieces of an image, in parallel.
template <typename T, bool planar, typename F>
void for_pieces(const Image& image, const F& f) {
  const Rows<T, planar> rows(image);
  const int64_t pairs = (image.rows + 1) / 2, unit = rows.unit();
  const int64_t length = std::max<int64_t>(kPiece / unit & ~int64_t{1}, 2);
  const int64_t room = std::min(length, image.columns) * unit;
  const int64_t grain = std::max<int64_t>(kGrain / (2 * image.columns * unit), 1);
  parallel_for(0, rows.planes() * pairs, grain, [&](int64_t first, int64_t last) {
    std::vector<Accumulator<T>> buffers(4 * room);
    std::vector<T> scratch(room);
    for (int64_t index = first; index < last; ++index) {
      const int64_t plane = index / pairs, pair = index % pairs;
      for (int64_t pixel = 0; pixel < image.columns; pixel += length)
        f(Piece<T>{plane,
                   pair,
                   pixel,
                   std::min(length, image.columns - pixel),
                   2 * pair + 1 < image.rows,
                   {&buffers[0], &buffers[room], &buffers[2 * room], &buffers[3 * room]},
                   scratch.data()});
    }
    stream_fence();
  });
}

// -- the transforms -------------------------------------------------------------------------------

// From an image to its bands. What an odd edge lacks is its neighbour again, or (cropped) zero.
template <typename T, bool planar, bool cropped>
void analyse(const Image& x, const HaarBands& bands) {
  using A = Accumulator<T>;
  const bool streaming = streams<T>(x, 1);
  const Rows<T, planar> from(x), ll(bands.ll, streaming), lh(bands.lh, streaming),
      hl(bands.hl, streaming), hh(bands.hh, streaming);
  for_pieces<T, planar>(x, [&](const Piece<T>& piece) {
    const T* above = from.at(piece.plane, piece.above(), piece.pixel);
    const T* below = from.at(piece.plane, piece.below(), piece.pixel);
    for_blocks<planar, A>(piece.pixels, from.unit(), [&](auto block) {
      auto [a, b] = block.get_pair(above, from.ahead);
      auto [c, d] = block.get_pair(below, from.ahead);
      if constexpr (cropped) {
        const decltype(a + a) zero = {};
        if (block.kEdge) b = d = zero;
        if (!piece.has_below) c = d = zero;
      }
      const auto top = (a + b) * A(0.5), top_step = (a - b) * A(0.5);
      const auto bottom = (c + d) * A(0.5), bottom_step = (c - d) * A(0.5);
      block.put(piece.out[0], top + bottom);
      block.put(piece.out[1], top - bottom);
      block.put(piece.out[2], top_step + bottom_step);
      block.put(piece.out[3], top_step - bottom_step);
    });
    piece.write_band(ll, piece.out[0]);
    piece.write_band(lh, piece.out[1]);
    piece.write_band(hl, piece.out[2]);
    piece.write_band(hh, piece.out[3]);
  });
}

// From bands to their image. What an odd edge lacks is left out, or (folded) added to its
// neighbour.
template <typename T, bool planar, bool folded>
void synthesise(const HaarBands& bands, const Image& x) {
  using A = Accumulator<T>;
  const Rows<T, planar> to(x, streams<T>(x, 1)), ll(bands.ll), lh(bands.lh), hl(bands.hl),
      hh(bands.hh);
  for_pieces<T, planar>(x, [&](const Piece<T>& piece) {
    const auto band = [&](const Rows<T, planar>& rows) -> const T* {
      return rows.at(piece.plane, piece.pair, piece.pixel / 2);
    };
    const T *from_ll = band(ll), *from_lh = band(lh), *from_hl = band(hl), *from_hh = band(hh);
    for_blocks<planar, A>(piece.pixels, to.unit(), [&](auto block) {
      const auto s = block.get(from_ll), t = block.get(from_lh);
      const auto u = block.get(from_hl), v = block.get(from_hh);
      const auto top = (s + t) * A(0.5), top_step = (u + v) * A(0.5);
      const auto bottom = (s - t) * A(0.5), bottom_step = (u - v) * A(0.5);
      Pair above{top + top_step, top - top_step}, below{bottom + bottom_step, bottom - bottom_step};
      if constexpr (folded) {
        if (!piece.has_below) above.left += below.left, above.right += below.right;
        if (block.kEdge) above.left += above.right, below.left += below.right;
      }
      block.put_pair(piece.out[0], above);
      block.put_pair(piece.out[1], below);
    });
    piece.write_image(to, piece.above(), piece.out[0]);
    if (piece.has_below) piece.write_image(to, piece.below(), piece.out[1]);
  });
}

// low: the mean of each block; high: what remains.
template <typename T, bool planar>
void split(const Image& x, const Image& low, const Image& high) {
  using A = Accumulator<T>;
  const bool streaming = streams<T>(x, 2);
  const Rows<T, planar> from(x), to_low(low, streaming), to_high(high, streaming);
  for_pieces<T, planar>(x, [&](const Piece<T>& piece) {
    const T* above = from.at(piece.plane, piece.above(), piece.pixel);
    const T* below = from.at(piece.plane, piece.below(), piece.pixel);
    for_blocks<planar, A>(piece.pixels, from.unit(), [&](auto block) {
      const auto p = block.get_pair(above, from.ahead), q = block.get_pair(below, from.ahead);
      const auto mean = (p.left + p.right + q.left + q.right) * A(0.25);
      block.put_pair(piece.out[0], Pair{mean, mean});
      block.put_pair(piece.out[1], Pair{p.left - mean, p.right - mean});
      block.put_pair(piece.out[2], Pair{q.left - mean, q.right - mean});
    });
    piece.write_image(to_low, piece.above(), piece.out[0]);
    piece.write_image(to_high, piece.above(), piece.out[1]);
    if (piece.has_below) {
      piece.write_image(to_low, piece.below(), piece.out[0]);
      piece.write_image(to_high, piece.below(), piece.out[2]);
    }
  });
}

// grad_x = grad_high + mean of the block (grad_low - grad_high): the split is symmetric, at odd
// edges as well, where the mean is that of the pixels that are there.
template <typename T, bool planar>
void split_backward(const Image& grad_low, const Image& grad_high, const Image& grad_x) {
  using A = Accumulator<T>;
  const Rows<T, planar> to(grad_x, streams<T>(grad_x, 1)), low(grad_low), high(grad_high);
  for_pieces<T, planar>(grad_x, [&](const Piece<T>& piece) {
    const T* low_above = low.at(piece.plane, piece.above(), piece.pixel);
    const T* low_below = low.at(piece.plane, piece.below(), piece.pixel);
    const T* high_above = high.at(piece.plane, piece.above(), piece.pixel);
    const T* high_below = high.at(piece.plane, piece.below(), piece.pixel);
    for_blocks<planar, A>(piece.pixels, to.unit(), [&](auto block) {
      const auto p = block.get_pair(low_above, low.ahead), q = block.get_pair(low_below, low.ahead);
      const auto r = block.get_pair(high_above, high.ahead),
                 s = block.get_pair(high_below, high.ahead);
      const auto mean =
          ((p.left - r.left) + (p.right - r.right) + (q.left - s.left) + (q.right - s.right)) *
          A(0.25);
      block.put_pair(piece.out[0], Pair{r.left + mean, r.right + mean});
      block.put_pair(piece.out[1], Pair{s.left + mean, s.right + mean});
    });
    piece.write_image(to, piece.above(), piece.out[0]);
    if (piece.has_below) piece.write_image(to, piece.below(), piece.out[1]);
  });
}

// Call f(zero, planar) with the element type and the layout as C++ knows them.
template <typename F>
void dispatch(Type type, bool planar, const F& f) {
  with_type(type, [&](auto zero) {
    if (planar)
      f(zero, std::true_type());
    else
      f(zero, std::false_type());
  });
}

}  // namespace

void haar_dwt2d(Type type, bool planar, const Image& x, const HaarBands& bands) {
  dispatch(type, planar,
           [&](auto zero, auto is_planar) { analyse<decltype(zero), is_planar, false>(x, bands); });
}

void haar_dwt2d_backward(Type type, bool planar, const HaarBands& grads, const Image& grad_x) {
  dispatch(type, planar, [&](auto zero, auto is_planar) {
    synthesise<decltype(zero), is_planar, true>(grads, grad_x);
  });
}

void haar_idwt2d(Type type, bool planar, const HaarBands& bands, const Image& x) {
  dispatch(type, planar, [&](auto zero, auto is_planar) {
    synthesise<decltype(zero), is_planar, false>(bands, x);
  });
}

void haar_idwt2d_backward(Type type, bool planar, const Image& grad_x, const HaarBands& grads) {
  dispatch(type, planar, [&](auto zero, auto is_planar) {
    analyse<decltype(zero), is_planar, true>(grad_x, grads);
  });
}

void haar_split2d(Type type, bool planar, const Image& x, const Image& low, const Image& high) {
  dispatch(type, planar,
           [&](auto zero, auto is_planar) { split<decltype(zero), is_planar>(x, low, high); });
}

void haar_split2d_backward(Type type, bool planar, const Image& grad_low, const Image& grad_high,
                           const Image& grad_x) {
  dispatch(type, planar, [&](auto zero, auto is_planar) {
    split_backward<decltype(zero), is_planar>(grad_low, grad_high, grad_x);
  });
}

}  // namespace fastfusion::FF_CAPABILITY
