// 3x3 convolutions with stride 1 and padding 1 by Winograd's algorithm (Lavin and Gray 2016), and
// the gradients of their kernels, for XLA's CPU backend: NHWC, HWIO, float32, channels in multiples
// of 16.
//
// Tiles of 4x4 outputs, each from 6x6 inputs: 36 products in place of 144.  Inputs, kernels and
// outputs are interpolated at the points 0, +-sqrt(1/2), +-sqrt(2) and infinity, with which float32
// loses less than with the usual 0, +-1, +-2.  All three ways (forward, of the image, of the
// kernel) are 36 products of matrices between transforms of tiles.  Work is cut into pieces by
// shapes alone, each piece has one order of summation, and pieces are added up in their order: so
// the numbers do not depend on the number of threads or on their timing.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// 1. Vectors of channels.

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, ROWS = 6;
#else
#error "expected a CPU with AVX2 and FMA: nothing else was measured"
#endif

constexpr int PANEL = 16;             // columns of a product that are in registers at once
constexpr int COLUMNS = PANEL / LANES;  // and the vectors that hold them; ROWS of them are sums
constexpr int POINTS = 36;
constexpr int64_t TILES = 24;         // of a block of a map, and of one of a kernel's gradient:
constexpr int64_t SUMMED_TILES = 48;  // small enough for a cache, large enough for a product
constexpr int64_t RANGE = 64;         // output channels of a block

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

// 2. The transforms of one line of a tile.

constexpr float A = 0.70710678118654752f, A2 = 0.5f, A3 = A2 * A;
constexpr float B = 1.41421356237309505f, B2 = 2.0f, B3 = B2 * B;
constexpr float AB2 = A2 * B2, SUM2 = A2 + B2;
// The inverses of the products of differences between a point and all others.
constexpr float OF_0 = 1 / AB2, OF_A = 1 / (2 * A2 * (A2 - B2)), OF_B = 1 / (2 * B2 * (B2 - A2));

struct Image {
  static constexpr int from = 6, to = 6;
  static inline void line(const Vector* x, Vector* v) {
    v[0] = AB2 * x[0] - SUM2 * x[2] + x[4];
    Vector even = x[4] - B2 * x[2], odd = A * x[3] - (A * B2) * x[1];
    v[1] = even + odd;
    v[2] = even - odd;
    even = x[4] - A2 * x[2];
    odd = B * x[3] - (B * A2) * x[1];
    v[3] = even + odd;
    v[4] = even - odd;
    v[5] = AB2 * x[1] - SUM2 * x[3] + x[5];
  }
};

struct Output {
  static constexpr int from = 6, to = 4;
  static inline void line(const Vector* m, Vector* y) {
    const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Vector even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = A * odd_a + B * odd_b;
    y[2] = A2 * even_a + B2 * even_b;
    y[3] = A3 * odd_a + B3 * odd_b + m[5];
  }
};

struct Gradient {  // the transpose of Output
  static constexpr int from = 4, to = 6;
  static inline void line(const Vector* y, Vector* m) {
    m[0] = y[0];
    Vector even = y[0] + A2 * y[2], odd = A * y[1] + A3 * y[3];
    m[1] = even + odd;
    m[2] = even - odd;
    even = y[0] + B2 * y[2];
    odd = B * y[1] + B3 * y[3];
    m[3] = even + odd;
    m[4] = even - odd;
    m[5] = y[3];
  }
};

struct Kernel {
  static constexpr int from = 3, to = 6;
  static inline void line(const Vector* g, Vector* u) {
    u[0] = OF_0 * g[0];
    Vector even = OF_A * g[0] + (OF_A * A2) * g[2], odd = (OF_A * A) * g[1];
    u[1] = even + odd;
    u[2] = even - odd;
    even = OF_B * g[0] + (OF_B * B2) * g[2];
    odd = (OF_B * B) * g[1];
    u[3] = even + odd;
    u[4] = even - odd;
    u[5] = g[2];
  }
};

struct KernelGradient {  // the transpose of Kernel
  static constexpr int from = 6, to = 3;
  static inline void line(const Vector* u, Vector* g) {
    const Vector even_a = u[1] + u[2], odd_a = u[1] - u[2];
    const Vector even_b = u[3] + u[4], odd_b = u[3] - u[4];
    g[0] = OF_0 * u[0] + OF_A * even_a + OF_B * even_b;
    g[1] = (OF_A * A) * odd_a + (OF_B * B) * odd_b;
    g[2] = (OF_A * A2) * even_a + (OF_B * B2) * even_b + u[5];
  }
};

// A transform of the columns and then of the rows of a tile: read(i, j), write(i, j, value).
template <typename T, typename Read, typename Write>
inline __attribute__((always_inline)) void transform(const Read& read, const Write& write) {
  Vector half[T::to][T::from];
#pragma GCC unroll 6
  for (int j = 0; j < T::from; ++j) {
    Vector column[T::from], made[T::to];
#pragma GCC unroll 6
    for (int i = 0; i < T::from; ++i) column[i] = read(i, j);
    T::line(column, made);
#pragma GCC unroll 6
    for (int i = 0; i < T::to; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < T::to; ++i) {
    Vector made[T::to];
    T::line(half[i], made);
#pragma GCC unroll 6
    for (int j = 0; j < T::to; ++j) write(i, j, made[j]);
  }
}

// 3. Products of matrices.

struct Left {  // element (row, k) is data[row * by_row + k * by_depth]
  const float* data;
  int64_t by_row, by_depth;
};

// M rows and PANEL columns of the product, added to `sums` if ADD; right and sums have rows of
// right_row and sums_row numbers.
template <bool ADD, int M>
inline void product(Left left, const float* right, int64_t right_row, int64_t depth, float* sums,
                    int64_t sums_row) {
  Vector sum[M][COLUMNS];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < COLUMNS; ++v)
      sum[m][v] = ADD ? load(sums + m * sums_row + v * LANES) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[COLUMNS];
#pragma GCC unroll 2
    for (int v = 0; v < COLUMNS; ++v) row[v] = load(right + k * right_row + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float factor = left.data[m * left.by_row + k * left.by_depth];
#pragma GCC unroll 2
      for (int v = 0; v < COLUMNS; ++v) sum[m][v] += factor * row[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < COLUMNS; ++v) store(sums + m * sums_row + v * LANES, sum[m][v]);
}

template <bool ADD, int M = ROWS>
inline void product_of(int rows, Left left, const float* right, int64_t right_row, int64_t depth,
                       float* sums, int64_t sums_row) {
  if constexpr (M > 0) {
    if (rows == M)
      product<ADD, M>(left, right, right_row, depth, sums, sums_row);
    else
      product_of<ADD, M - 1>(rows, left, right, right_row, depth, sums, sums_row);
  }
}

// The same for any number of rows, in groups of about equal size.
template <bool ADD>
inline void product_rows(int64_t rows, Left left, const float* right, int64_t right_row,
                         int64_t depth, float* sums, int64_t sums_row) {
  const int64_t groups = (rows + ROWS - 1) / ROWS;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * rows / groups, last = (group + 1) * rows / groups;
    const Left part = {left.data + first * left.by_row, left.by_row, left.by_depth};
    product_of<ADD>(last - first, part, right, right_row, depth, sums + first * sums_row, sums_row);
  }
}

// 4. Tiles.

struct Shape {
  int64_t height, width, in, out, rows, columns, tiles;  // in, out: channels; tiles of the batch

  Shape(ffi::Span<const int64_t> x, int64_t out)
      : height(x[1]), width(x[2]), in(x[3]), out(out), rows((x[1] + 3) / 4),
        columns((x[2] + 3) / 4), tiles(x[0] * rows * columns) {}
};

struct Tile {
  int64_t image, y, x;  // of its first output

  Tile(const Shape& shape, int64_t index)
      : image(index / (shape.rows * shape.columns)),
        y(index / shape.columns % shape.rows * 4), x(index % shape.columns * 4) {}
};

// Tiles first to last of maps with `all` channels, of which `channels` from `map` on, transformed:
// out[point][tile][channel], with `plane` numbers for each point.  Zeros are around a map.
template <typename T, int BEFORE>
void transform_tiles(const Shape& shape, const float* map, int64_t all, int64_t channels,
                     int64_t first, int64_t last, float* out, int64_t plane) {
  static const Vector zeros = {};
  for (int64_t index = first; index < last; ++index) {
    const Tile tile(shape, index);
    const float* pixels[T::from][T::from];
    int64_t step[T::from][T::from];
    for (int i = 0; i < T::from; ++i)
      for (int j = 0; j < T::from; ++j) {
        const int64_t y = tile.y + i - BEFORE, x = tile.x + j - BEFORE;
        const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
        const int64_t pixel = (tile.image * shape.height + y) * shape.width + x;
        pixels[i][j] = inside ? map + pixel * all : reinterpret_cast<const float*>(&zeros);
        step[i][j] = inside;
      }
    float* to = out + (index - first) * channels;
    for (int64_t c = 0; c < channels; c += LANES)
      transform<T>([&](int i, int j) { return load(pixels[i][j] + c * step[i][j]); },
                   [&](int i, int j, Vector v) { store(to + (6 * i + j) * plane + c, v); });
  }
}

// The outputs of tiles first to last, of `channels` from y on, from their products at each point.
void output_tiles(const Shape& shape, const float* products, int64_t plane, int64_t first,
                  int64_t last, int64_t channels, float* y) {
  for (int64_t index = first; index < last; ++index) {
    const Tile tile(shape, index);
    const float* from = products + (index - first) * channels;
    float* to = y + ((tile.image * shape.height + tile.y) * shape.width + tile.x) * shape.out;
    const int64_t high = std::min<int64_t>(4, shape.height - tile.y);
    const int64_t wide = std::min<int64_t>(4, shape.width - tile.x);
    for (int64_t k = 0; k < channels; k += LANES)
      transform<Output>([&](int i, int j) { return load(from + (6 * i + j) * plane + k); },
                        [&](int i, int j, Vector v) {
                          if (i < high && j < wide)
                            store(to + (i * shape.width + j) * shape.out + k, v);
                        });
  }
}

// The kernel at each point, of 16 input channels from c on: to[point][panel][in][PANEL].
// flipped: of the convolution that gives the gradient of the image: the kernel is [3, 3, out, in].
void transform_kernel(const Shape& shape, const float* kernel, bool flipped, int64_t c, float* to) {
  const int64_t plane = shape.in * shape.out;
  for (int64_t k = 0; k < shape.out; k += PANEL) {
    float turned[16][9][PANEL];
    if (flipped)
      for (int p = 0; p < 9; ++p)
        for (int column = 0; column < PANEL; ++column)
          for (int row = 0; row < 16; ++row)
            turned[row][p][column] =
                kernel[((8 - p) * shape.out + k + column) * shape.in + c + row];
    const int64_t step = flipped ? PANEL : plane;
    for (int row = 0; row < 16; ++row) {
      const float* from = flipped ? turned[row][0] : kernel + (c + row) * shape.out + k;
      for (int v = 0; v < PANEL; v += LANES)
        transform<Kernel>(
            [&](int i, int j) { return load(from + (3 * i + j) * step + v); },
            [&](int i, int j, Vector u) {
              store(to + (6 * i + j) * plane + k * shape.in + (c + row) * PANEL + v, u);
            });
    }
  }
}

// 5. Threads and memory.

// work(0) to work(count - 1), on this thread and on those of the pool that are free: so a pool
// whose threads all wait here makes progress too.
template <typename Work>
void parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  const auto shared = std::make_shared<Shared>();
  // One that starts after the last piece was taken no longer reads `work`.
  const auto run = [shared, count, &work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      work(i);
      if (shared->done.fetch_add(1) + 1 == count) {
        const std::lock_guard<std::mutex> lock(shared->mutex);
        shared->finished.notify_all();
      }
    }
  };
  const int64_t others = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < others; ++i) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done.load() == count; });
}

enum Use { IMAGES, PRODUCTS, WHOLE, USES };

// Memory of this thread, kept for the next call: new pages would cost more than the transforms.
float* scratch(Use use, int64_t size) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[USES];
  Buffer& buffer = buffers[use];
  if (buffer.size < size) {
    std::free(buffer.data);
    buffer.size = (size + 15) / 16 * 16;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, 4 * buffer.size));
  }
  return buffer.data;
}

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// So that the 36 planes of a block do not fall on the same lines of a cache.
int64_t plane_of(int64_t tiles, int64_t channels) { return tiles * channels + 16; }

// 6. What XLA calls.

ffi::Error Convolve(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                    ffi::ResultBuffer<ffi::F32> y, bool flipped) {
  const Shape shape(x.dimensions(), y->dimensions()[3]);
  float* kernels = scratch(WHOLE, POINTS * shape.in * shape.out);
  parallel(pool, shape.in / 16, [&](int64_t part) {
    transform_kernel(shape, kernel.typed_data(), flipped, 16 * part, kernels);
  });
  parallel(pool, ceil_of(shape.tiles, TILES), [&](int64_t block) {
    const int64_t first = block * TILES, last = std::min(shape.tiles, first + TILES);
    const int64_t plane = plane_of(TILES, shape.in);
    float* image = scratch(IMAGES, POINTS * plane);
    transform_tiles<Image, 1>(shape, x.typed_data(), shape.in, shape.in, first, last, image, plane);
    for (int64_t start = 0; start < shape.out; start += RANGE) {
      const int64_t channels = std::min(shape.out - start, RANGE);
      const int64_t made_plane = plane_of(TILES, channels);
      float* made = scratch(PRODUCTS, POINTS * made_plane);
      for (int64_t p = 0; p < POINTS; ++p)
        for (int64_t k = 0; k < channels; k += PANEL)
          product_rows<false>(last - first, {image + p * plane, shape.in, 1},
                              kernels + (p * shape.out + start + k) * shape.in, PANEL, shape.in,
                              made + p * made_plane + k, channels);
      output_tiles(shape, made, made_plane, first, last, channels, y->typed_data() + start);
    }
  });
  return ffi::Error::Success();
}

ffi::Error ConvolveKernel(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> y,
                          ffi::ResultBuffer<ffi::F32> kernel) {
  const Shape shape(x.dimensions(), y.dimensions()[3]);
  const int64_t size = POINTS * shape.in * shape.out;
  const int64_t blocks = ceil_of(shape.tiles, SUMMED_TILES), ranges = ceil_of(shape.out, RANGE);
  // Parts of the batch have sums of their own, 16 MB of them or two.
  const int64_t most = std::max<int64_t>(2, (int64_t{1} << 22) / size);
  const int64_t parts = std::min({most, ceil_of(blocks, 4), int64_t{16}});
  float* sums = scratch(WHOLE, parts * size);
  parallel(pool, parts * ranges, [&](int64_t piece) {
    const int64_t part = piece / ranges, start = piece % ranges * RANGE;
    const int64_t channels = std::min(shape.out - start, RANGE);
    const int64_t plane = plane_of(SUMMED_TILES, shape.in), y_plane = plane_of(SUMMED_TILES, channels);
    float* image = scratch(IMAGES, POINTS * plane);
    float* gradient = scratch(PRODUCTS, POINTS * y_plane);
    const int64_t first_block = part * blocks / parts;
    for (int64_t block = first_block; block < (part + 1) * blocks / parts; ++block) {
      const int64_t first = block * SUMMED_TILES, last = std::min(shape.tiles, first + SUMMED_TILES);
      transform_tiles<Image, 1>(shape, x.typed_data(), shape.in, shape.in, first, last, image,
                                plane);
      transform_tiles<Gradient, 0>(shape, y.typed_data() + start, shape.out, channels, first, last,
                                   gradient, y_plane);
      const auto add = block == first_block ? product_rows<false> : product_rows<true>;
      for (int64_t p = 0; p < POINTS; ++p)
        for (int64_t k = 0; k < channels; k += PANEL)
          add(shape.in, {image + p * plane, 1, shape.in}, gradient + p * y_plane + k, channels,
              last - first, sums + part * size + (p * shape.out + start + k) * shape.in, PANEL);
    }
  });
  parallel(pool, shape.in / 16, [&](int64_t slice) {
    for (int64_t c = 16 * slice; c < 16 * slice + 16; ++c)
      for (int64_t k = 0; k < shape.out; k += LANES) {
        const float* from = sums + k / PANEL * PANEL * shape.in + c * PANEL + k % PANEL;
        transform<KernelGradient>(
            [&](int i, int j) {
              const float* at = from + (6 * i + j) * shape.in * shape.out;
              Vector total = load(at);
              for (int64_t part = 1; part < parts; ++part) total += load(at + part * size);
              return total;
            },
            [&](int i, int j, Vector g) {
              store(kernel->typed_data() + ((3 * i + j) * shape.in + c) * shape.out + k, g);
            });
      }
  });
  return ffi::Error::Success();
}

}  // namespace

using Numbers = ffi::Buffer<ffi::F32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(dfkd_winograd, Convolve,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Numbers>().Arg<Numbers>()
                                  .Ret<Numbers>().Attr<bool>("flipped"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dfkd_winograd_kernel, ConvolveKernel,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Numbers>().Arg<Numbers>()
                                  .Ret<Numbers>());
