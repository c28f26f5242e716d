// Patches of an image as blocks of vectors, and back. A block holds channels x vectors; the lanes
// of a vector are the same pixel of as many patches (Strip), or as many pixels of one patch (Run).
#pragma once

#include <algorithm>
#include <vector>

#include "block.h"
#include "types.h"

namespace fastfusion::FF_CAPABILITY {

// Call f with a value of the stored type, one of those that are computed in A.
template <typename A, typename F>
void with_stored_type(Type type, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(double());
  } else {
    if (type == Type::kHalf)
      f(Half());
    else if (type == Type::kBFloat16)
      f(BFloat16());
    else
      f(float());
  }
}

inline int64_t size_of(Type type) {
  return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
}

// How an image is cut: patch by patch along the rows, image after image, padded with zeros at the
// bottom and right to whole patches.
struct Cutting {
  int64_t patch_rows, patch_columns, down, across, images;

  Cutting(const Image& x, int64_t patch_rows, int64_t patch_columns)
      : patch_rows(patch_rows),
        patch_columns(patch_columns),
        down((x.rows + patch_rows - 1) / patch_rows),
        across((x.columns + patch_columns - 1) / patch_columns),
        images(x.batch) {}

  int64_t count() const { return images * down * across; }
  int64_t pixels() const { return patch_rows * patch_columns; }
};

// A place in an image batch.
struct Place {
  int64_t image, row, column;
};

inline Place origin(const Cutting& cut, int64_t patch) {
  const int64_t image = patch / (cut.down * cut.across), rest = patch % (cut.down * cut.across);
  return {image, rest / cut.across * cut.patch_rows, rest % cut.across * cut.patch_columns};
}

// Neighbours along an image row, `length` of them, that lie at `at` in a line put together from
// such segments. What lies outside of the image reads as 0 and is not written.
struct Segment {
  int64_t at, length;
  Place from;
};

class Line {
 public:
  Line() = default;
  Line(std::vector<Segment> segments, int64_t length)
      : segments_(std::move(segments)), length_(length) {}

  // The elements of one channel, `down` rows below: in place where they are one piece of memory,
  // else put together in `buffer`.
  template <typename T>
  const T* read(const Image& x, int64_t channel, int64_t down, T* buffer) const {
    if (const T* whole = in_place<T>(x, channel, down)) return whole;
    int64_t end = 0;
    for (const Segment& s : segments_) {
      const int64_t inside = count_inside(s, x, down);
      const T* from = x.at<T>(s.from.image, channel, s.from.row + down, s.from.column);
      std::copy(from, from + inside, buffer + s.at);
      std::fill(buffer + s.at + inside, buffer + s.at + s.length, T{});
      end = s.at + s.length;
    }
    std::fill(buffer + end, buffer + length_, T{});
    return buffer;
  }

  // Ask for the elements' memory ahead of time. (Inlined by force: gcc drops calls of functions
  // that do nothing but this.)
  template <int Write>
  FF_INLINE void prefetch(const Image& x, int64_t channel, int64_t down, int64_t size) const {
    for (const Segment& s : segments_) {
      const int64_t at = s.from.image * x.batch_stride + channel * x.channel_stride +
                         (s.from.row + down) * x.row_stride + s.from.column;
      const char* bytes = static_cast<const char*>(x.data) + at * size;
      const int64_t length = count_inside(s, x, down) * size;
      for (int64_t n = 0; n < length; n += 64) __builtin_prefetch(bytes + n, Write, 2);
    }
  }

  // Call f(position in the line, place in memory) on every `step` elements of a channel, where all
  // segments are made of such pieces and lie inside of the image; false where they are not.
  template <typename T, typename F>
  bool for_pieces(const Image& x, int64_t channel, int64_t step, const F& f) const {
    if (!whole_pieces(x, step)) return false;
    for (const Segment& s : segments_) {
      T* from = x.at<T>(s.from.image, channel, s.from.row, s.from.column);
      for (int64_t n = 0; n < s.length; n += step) f(s.at + n, from + n);
    }
    return true;
  }

  // Where to write the elements to: in place or into `buffer`, which `finish` then brings home.
  template <typename T>
  T* begin(const Image& y, int64_t channel, int64_t down, T* buffer) const {
    T* whole = in_place<T>(y, channel, down);
    return whole ? whole : buffer;
  }
  template <typename T>
  void finish(const Image& y, int64_t channel, int64_t down, const T* written,
              const T* buffer) const {
    if (written != buffer) return;
    for (const Segment& s : segments_)
      std::copy(buffer + s.at, buffer + s.at + count_inside(s, y, down),
                y.at<T>(s.from.image, channel, s.from.row + down, s.from.column));
  }

 private:
  static int64_t count_inside(const Segment& s, const Image& x, int64_t down) {
    if (s.from.row + down >= x.rows) return 0;
    return std::clamp<int64_t>(x.columns - s.from.column, 0, s.length);
  }
  bool whole_pieces(const Image& x, int64_t step) const {
    for (const Segment& s : segments_)
      if (s.length % step != 0 || count_inside(s, x, 0) < s.length) return false;
    return true;
  }
  template <typename T>
  T* in_place(const Image& x, int64_t channel, int64_t down) const {
    const Segment& s = segments_.front();
    if (segments_.size() > 1 || s.length < length_ || count_inside(s, x, down) < length_)
      return nullptr;
    return x.at<T>(s.from.image, channel, s.from.row + down, s.from.column);
  }

  std::vector<Segment> segments_;
  int64_t length_ = 0;
};

// -- the three ways through memory ----------------------------------------------------------------

// One vector a channel, whose lanes lie anywhere: lane i of channel c at place[i] (nothing where
// null) + c * stride.
template <typename T, typename A = Accumulator<T>>
void read_lanes(const T* const* place, int64_t stride, int64_t channels, A* to, int64_t step) {
  constexpr int lanes = kLanes<A>;
  int64_t c = 0;
  if (stride == 1 && channels > 1) {
    for (; c < channels; c += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(lanes, channels - c));
      Vector<A> v[lanes];
      for (int lane = 0; lane < lanes; ++lane) {
        if (place[lane] == nullptr)
          v[lane] = Vector<A>{};
        else
          v[lane] = count == lanes ? load(place[lane] + c) : load(place[lane] + c, count);
      }
      transpose<A>(v);
      for (int i = 0; i < count; ++i) store(to + (c + i) * step, v[i]);
    }
    return;
  }
  for (; c < channels; ++c)
    for (int lane = 0; lane < lanes; ++lane)
      to[c * step + lane] = place[lane] ? widen(place[lane][c * stride]) : A(0);
}

template <typename T, typename A = Accumulator<T>>
void write_lanes(T* const* place, int64_t stride, int64_t channels, const A* from, int64_t step) {
  constexpr int lanes = kLanes<A>;
  int64_t c = 0;
  if (stride == 1 && channels > 1) {
    for (; c < channels; c += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(lanes, channels - c));
      Vector<A> v[lanes];
      for (int i = 0; i < lanes; ++i) v[i] = i < count ? load(from + (c + i) * step) : Vector<A>{};
      transpose<A>(v);
      for (int lane = 0; lane < lanes; ++lane) {
        if (place[lane] == nullptr) continue;
        if (count == lanes)
          store(place[lane] + c, v[lane]);
        else
          store(place[lane] + c, v[lane], count);
      }
    }
    return;
  }
  for (; c < channels; ++c)
    for (int lane = 0; lane < lanes; ++lane)
      if (place[lane]) place[lane][c * stride] = narrow<T>(from[c * step + lane]);
}

// Every N-th element of N vectors: v[q][i] = memory[i * N + q], and back; N a power of two.
template <int N, typename V>
FF_INLINE void unzip(V* v) {
  if constexpr (N > 1) {
    typedef decltype(v[0] > v[0]) Index;
    constexpr int lanes = sizeof(V) / sizeof(v[0][0]);
    Index even, odd;
    for (int lane = 0; lane < lanes; ++lane) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
    V low[N / 2], high[N / 2];
    unroll<N / 2>([&](auto i) {
      low[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even);
      high[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    });
    unzip<N / 2>(low);
    unzip<N / 2>(high);
    unroll<N / 2>([&](auto i) { v[2 * i] = low[i], v[2 * i + 1] = high[i]; });
  }
}
template <int N, typename V>
FF_INLINE void zip(V* v) {
  if constexpr (N > 1) {
    typedef decltype(v[0] > v[0]) Index;
    constexpr int lanes = sizeof(V) / sizeof(v[0][0]);
    Index first, second;
    for (int lane = 0; lane < lanes; ++lane) {
      first[lane] = lane / 2 + (lane % 2 ? lanes : 0);
      second[lane] = first[lane] + lanes / 2;
    }
    V low[N / 2], high[N / 2];
    unroll<N / 2>([&](auto i) { low[i] = v[2 * i], high[i] = v[2 * i + 1]; });
    zip<N / 2>(low);
    zip<N / 2>(high);
    unroll<N / 2>([&](auto i) {
      v[2 * i] = __builtin_shuffle(low[i], high[i], first);
      v[2 * i + 1] = __builtin_shuffle(low[i], high[i], second);
    });
  }
}

// A line of kLanes patch rows of `columns` pixels, to as many vectors `step` apart.
template <typename T, typename A = Accumulator<T>>
void split_line(const T* line, int64_t columns, A* to, int64_t step) {
  constexpr int lanes = kLanes<A>;
  const auto split = [&](auto n) {
    Vector<A> v[n];
    unroll<n>([&](auto i) { v[i] = load(line + i * lanes); });
    unzip<n>(v);
    unroll<n>([&](auto i) { store(to + i * step, v[i]); });
  };
  if (columns == 1) return split(std::integral_constant<int, 1>());
  if (columns == 2) return split(std::integral_constant<int, 2>());
  if (columns == 4) return split(std::integral_constant<int, 4>());
  if (columns == 8) return split(std::integral_constant<int, 8>());
  for (int64_t column = 0; column < columns; ++column)
    for (int lane = 0; lane < lanes; ++lane)
      to[column * step + lane] = widen(line[lane * columns + column]);
}
template <typename T, typename A = Accumulator<T>>
void join_line(const A* from, int64_t step, int64_t columns, T* line) {
  constexpr int lanes = kLanes<A>;
  const auto join = [&](auto n) {
    Vector<A> v[n];
    unroll<n>([&](auto i) { v[i] = load(from + i * step); });
    zip<n>(v);
    unroll<n>([&](auto i) { store(line + i * lanes, v[i]); });
  };
  if (columns == 1) return join(std::integral_constant<int, 1>());
  if (columns == 2) return join(std::integral_constant<int, 2>());
  if (columns == 4) return join(std::integral_constant<int, 4>());
  if (columns == 8) return join(std::integral_constant<int, 8>());
  for (int64_t column = 0; column < columns; ++column)
    for (int lane = 0; lane < lanes; ++lane)
      line[lane * columns + column] = narrow<T>(from[column * step + lane]);
}

// -- many patches ---------------------------------------------------------------------------------

// The next kLanes patches: vector (channel, pixel), a lane each.
template <typename A>
class Strip {
  static constexpr int lanes = kLanes<A>;

 public:
  Strip(const Cutting& cut, int64_t first)
      : cut_(cut), count_(static_cast<int>(std::min<int64_t>(lanes, cut.count() - first))) {
    std::vector<Segment> segments;
    for (int lane = 0; lane < count_; ++lane) {
      place_[lane] = origin(cut, first + lane);
      // A patch continues the segment of its left neighbour.
      if (lane > 0 && place_[lane].column > 0)
        segments.back().length += cut.patch_columns;
      else
        segments.push_back({lane * cut.patch_columns, cut.patch_columns, place_[lane]});
    }
    line_ = Line(std::move(segments), lanes * cut.patch_columns);
  }

  int count() const { return count_; }

  // Bring the channels [begin, end) towards the cache, to be read or written soon: a strip touches
  // short pieces far apart, which the processor does not foresee.
  template <int Write>
  FF_INLINE void prefetch(Type type, const Image& x, int64_t begin, int64_t end) const {
    if (!x.rows_dense()) return;
    for (int64_t c = begin; c < end; ++c)
      for (int64_t row = 0; row < cut_.patch_rows; ++row)
        line_.template prefetch<Write>(x, c, row, size_of(type));
  }

  // Channels [begin, end) to rows 0, 1, ... of the block; `buffer` has room for a line.
  void read(Type type, const Image& x, int64_t begin, int64_t end, Block<A> to, A* buffer) const {
    with_stored_type<A>(type, [&](auto zero) {
      using T = decltype(zero);
      if (x.rows_dense()) {
        for (int64_t c = begin; c < end; ++c)
          for (int64_t row = 0; row < cut_.patch_rows; ++row)
            split_line(line_.read(x, c, row, reinterpret_cast<T*>(buffer)), cut_.patch_columns,
                       to.at(c - begin, row * cut_.patch_columns), to.column);
        return;
      }
      for (int64_t pixel = 0; pixel < cut_.pixels(); ++pixel) {
        T* place[lanes];
        find(x, begin, pixel, place);
        read_lanes<T>(place, x.channel_stride, end - begin, to.at(0, pixel), to.row);
      }
    });
  }
  void write(Type type, Block<A> from, int64_t begin, int64_t end, const Image& y,
             A* buffer) const {
    with_stored_type<A>(type, [&](auto zero) {
      using T = decltype(zero);
      if (y.rows_dense()) {
        T* const spare = reinterpret_cast<T*>(buffer);
        for (int64_t c = begin; c < end; ++c)
          for (int64_t row = 0; row < cut_.patch_rows; ++row) {
            T* line = line_.begin(y, c, row, spare);
            join_line(from.at(c - begin, row * cut_.patch_columns), from.column, cut_.patch_columns,
                      line);
            line_.finish(y, c, row, line, spare);
          }
        return;
      }
      for (int64_t pixel = 0; pixel < cut_.pixels(); ++pixel) {
        T* place[lanes];
        find(y, begin, pixel, place);
        write_lanes<T>(place, y.channel_stride, end - begin, from.at(0, pixel), from.row);
      }
    });
  }

 private:
  template <typename T>
  void find(const Image& x, int64_t channel, int64_t pixel, T** place) const {
    for (int lane = 0; lane < lanes; ++lane) {
      place[lane] = nullptr;
      if (lane >= count_) continue;
      const int64_t row = place_[lane].row + pixel / cut_.patch_columns;
      const int64_t column = place_[lane].column + pixel % cut_.patch_columns;
      if (row < x.rows && column < x.columns)
        place[lane] = x.at<T>(place_[lane].image, channel, row, column);
    }
  }

  const Cutting& cut_;
  int count_;
  Place place_[lanes];
  Line line_;
};

// -- one patch ------------------------------------------------------------------------------------

// Pixels [first, first + count) of one patch: vector (channel, pixel / kLanes).
template <typename A>
class Run {
  static constexpr int lanes = kLanes<A>;

 public:
  Run(const Cutting& cut, int64_t patch, int64_t first, int64_t count)
      : cut_(cut), origin_(origin(cut, patch)), first_(first), count_(count) {
    std::vector<Segment> segments;
    for (int64_t pixel = first; pixel < first + count;) {
      const int64_t row = pixel / cut.patch_columns, column = pixel % cut.patch_columns;
      const int64_t length = std::min(cut.patch_columns - column, first + count - pixel);
      segments.push_back(
          {pixel - first, length, {origin_.image, origin_.row + row, origin_.column + column}});
      pixel += length;
    }
    line_ = Line(std::move(segments), vectors() * lanes);
  }

  int64_t vectors() const { return (count_ + lanes - 1) / lanes; }

  // Bring the channels [begin, end) towards the cache, to be read or written soon.
  template <int Write>
  FF_INLINE void prefetch(Type type, const Image& x, int64_t begin, int64_t end) const {
    if (!x.rows_dense()) return;
    for (int64_t c = begin; c < end; ++c) line_.template prefetch<Write>(x, c, 0, size_of(type));
  }

  void read(Type type, const Image& x, int64_t begin, int64_t end, Block<A> to, A* buffer) const {
    with_stored_type<A>(type, [&](auto zero) {
      using T = decltype(zero);
      if (x.rows_dense()) {
        for (int64_t c = begin; c < end; ++c) {
          A* const row = to.at(c - begin, 0);
          if (line_.template for_pieces<T>(x, c, lanes, [&](int64_t at, const T* from) {
                store(row + at / lanes * to.column, load(from));
              }))
            continue;
          const T* line = line_.read(x, c, 0, reinterpret_cast<T*>(buffer));
          for (int64_t n = 0; n < vectors(); ++n)
            store(to.at(c - begin, n), load(line + n * lanes));
        }
        return;
      }
      for (int64_t n = 0; n < vectors(); ++n) {
        T* place[lanes];
        find(x, begin, n, place);
        read_lanes<T>(place, x.channel_stride, end - begin, to.at(0, n), to.row);
      }
    });
  }
  void write(Type type, Block<A> from, int64_t begin, int64_t end, const Image& y,
             A* buffer) const {
    with_stored_type<A>(type, [&](auto zero) {
      using T = decltype(zero);
      if (y.rows_dense()) {
        T* const spare = reinterpret_cast<T*>(buffer);
        for (int64_t c = begin; c < end; ++c) {
          const A* const row = from.at(c - begin, 0);
          if (line_.template for_pieces<T>(y, c, lanes, [&](int64_t at, T* to) {
                store(to, load(row + at / lanes * from.column));
              }))
            continue;
          T* line = line_.begin(y, c, 0, spare);
          for (int64_t n = 0; n < vectors(); ++n)
            store(line + n * lanes, load(from.at(c - begin, n)));
          line_.finish(y, c, 0, line, spare);
        }
        return;
      }
      for (int64_t n = 0; n < vectors(); ++n) {
        T* place[lanes];
        find(y, begin, n, place);
        write_lanes<T>(place, y.channel_stride, end - begin, from.at(0, n), from.row);
      }
    });
  }

 private:
  template <typename T>
  void find(const Image& x, int64_t channel, int64_t vector, T** place) const {
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t pixel = vector * lanes + lane;
      place[lane] = nullptr;
      if (pixel >= count_) continue;
      const int64_t row = origin_.row + (first_ + pixel) / cut_.patch_columns;
      const int64_t column = origin_.column + (first_ + pixel) % cut_.patch_columns;
      if (row < x.rows && column < x.columns)
        place[lane] = x.at<T>(origin_.image, channel, row, column);
    }
  }

  const Cutting& cut_;
  Place origin_;
  int64_t first_, count_;
  Line line_;
};

}  // namespace fastfusion::FF_CAPABILITY
