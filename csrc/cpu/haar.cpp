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
#include <utility>
#include <vector>

#include "parallel.h"
#include "stream.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Elements of a row that are handled at once: the buffers of a piece stay in the first-level cache.
constexpr int64_t kPiece = 2048;
// How far ahead of its use a row is fetched, in bytes. The hardware's own prefetch stops at the end
// of a page and does not know of the second row: without this a transform takes twice the time.
constexpr int64_t kAhead = 6144;
// Elements of an image worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;

// -- the place of a block -------------------------------------------------------------------------

template <typename V>
struct Pair {
  V left, right;
};
template <typename V>
Pair(V, V) -> Pair<V>;

template <typename V, size_t... I>
FF_INLINE Pair<V> deinterleave(V first, V second, std::index_sequence<I...>) {
  return {__builtin_shufflevector(first, second, (2 * I)...),
          __builtin_shufflevector(first, second, (2 * I + 1)...)};
}

template <typename V, size_t... I>
FF_INLINE Pair<V> interleave(Pair<V> p, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I), half = n / 2;
  return {__builtin_shufflevector(p.left, p.right, (I / 2 + (I % 2) * n)...),
          __builtin_shufflevector(p.left, p.right, (half + I / 2 + (I % 2) * n)...)};
}

// Where one block, or (wide) a vector of neighbouring ones, lies in its rows: `band` in a row of a
// band, `left` in a row of the image, its right column `unit` further. In NCHW the unit is 1 and
// the two columns of neighbouring blocks alternate; in NHWC it is the number of channels. An edge
// block has no right column.
template <bool planar, bool wide, bool edge>
struct Block {
  static constexpr bool kEdge = edge;
  int64_t band, left, unit;

  template <typename T>
  FF_INLINE auto get(const T* row) const {
    if constexpr (wide)
      return load(row + band);
    else
      return widen(row[band]);
  }
  template <typename A, typename V>
  FF_INLINE void put(A* row, V value) const {
    if constexpr (wide)
      store(row + band, value);
    else
      row[band] = value;
  }
  // Both columns; of an edge block the left one twice. What lies `ahead` is fetched meanwhile.
  template <typename T>
  FF_INLINE auto get_pair(const T* row, int64_t ahead) const {
    if constexpr (wide) {
      __builtin_prefetch(row + left + ahead);
      if constexpr (!edge)
        __builtin_prefetch(row + left + (planar ? kLanes<Accumulator<T>> : unit) + ahead);
    }
    if constexpr (!wide) {
      const auto value = widen(row[left]);
      return Pair<decltype(value + 0)>{value, edge ? value : widen(row[left + (edge ? 0 : unit)])};
    } else {
      constexpr int lanes = kLanes<Accumulator<T>>;
      const auto value = load(row + left);
      if constexpr (edge)
        return Pair<Vector<Accumulator<T>>>{value, value};
      else if constexpr (planar)
        return deinterleave(value, load(row + left + lanes), std::make_index_sequence<lanes>());
      else
        return Pair<Vector<Accumulator<T>>>{value, load(row + left + unit)};
    }
  }
  template <typename A, typename V>
  FF_INLINE void put_pair(A* row, Pair<V> p) const {
    if constexpr (!wide) {
      row[left] = p.left;
      if constexpr (!edge) row[left + unit] = p.right;
    } else if constexpr (planar) {
      const Pair<V> mixed = interleave(p, std::make_index_sequence<kLanes<A>>());
      store(row + left, mixed.left);
      store(row + left + kLanes<A>, mixed.right);
    } else {
      store(row + left, p.left);
      if constexpr (!edge) store(row + left + unit, p.right);
    }
  }
};

// Call f(wide, index) so that all of [0, count) is covered: by vectors, the last of which may
// overlap the one before (results are written twice, alike), or one by one where there are fewer.
template <typename A, typename F>
FF_INLINE void cover(int64_t count, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i) f(std::false_type(), i);
    return;
  }
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) f(std::true_type(), i);
  if (i < count) f(std::true_type(), count - lanes);
}

// Call f(block) for all blocks of a pair of rows of so many pixels.
template <bool planar, typename A, typename F>
FF_INLINE void for_blocks(int64_t pixels, int64_t unit, const F& f) {
  const int64_t whole = pixels / 2;
  if constexpr (planar) {
    cover<A>(whole, [&](auto wide, int64_t j) { f(Block<true, wide, false>{j, 2 * j, 1}); });
    if (pixels % 2) f(Block<true, false, true>{whole, pixels - 1, 1});
  } else {
    for (int64_t j = 0; j < whole; ++j)
      cover<A>(unit, [&](auto wide, int64_t c) {
        f(Block<false, wide, false>{j * unit + c, 2 * j * unit + c, unit});
      });
    if (pixels % 2)
      cover<A>(unit, [&](auto wide, int64_t c) {
        f(Block<false, wide, true>{whole * unit + c, 2 * whole * unit + c, unit});
      });
  }
}

// -- pieces of rows -------------------------------------------------------------------------------

// The rows of an image as both layouts have them: `unit` elements make a pixel.
template <typename T, bool planar>
struct Rows {
  explicit Rows(const Image& image, bool streaming = false) : image(image), streaming(streaming) {
    const int64_t pair = 2 * image.columns * unit() * sizeof(T);
    if (pair < kAhead) ahead = (kAhead + pair - 1) / pair * 2 * image.row_stride;
  }
  const Image& image;
  const bool streaming;                // whether they are written past the caches
  int64_t ahead = kAhead / sizeof(T);  // elements from a pair of rows to what will be read soon

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
