/* The blocks of Decision Mamba without gradients: one window at a time, so that it stays in cache.

   A window is the work of one thread and no sum crosses windows: neither the batch around it nor
   the number of threads changes a bit of it. Widths are multiples of 16. STATES comes from outside.

   B, C, D and h are those of the selective scan. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
enum { LANES = 16, ROWS = 10 };  // 2 ROWS sums, two vectors and a factor fit in the registers
#else
enum { LANES = 8, ROWS = 5 };
#endif
#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.44269504f

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES)));

INLINE lanes load(const float *x) { return *(const lanes *)x; }
INLINE void store(float *x, lanes value) { *(lanes *)x = value; }
INLINE lanes all(float x) { return x - (lanes){}; }

INLINE lanes choose(bits flag, lanes yes, lanes no) {
  return (lanes)((flag & (bits)yes) | (~flag & (bits)no));
}

/* 2^x of x <= 0 to 3e-7 of its value, 1 at 0. The polynomial is a fit of least relative error to
   2^r on [-1/2, 1/2]. Whole numbers go into the exponent; without AVX-512 x is held at -126. */
INLINE lanes power(lanes x) {
#ifdef __AVX512F__
  lanes whole = (lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_NO_EXC);
#else
  x = choose(x < -126, all(-126), x);
  bits exponent = __builtin_convertvector(x - 0.5f, bits);  // cut towards 0: the nearest of x
  lanes whole = __builtin_convertvector(exponent, lanes);
#endif
  lanes r = x - whole;
  lanes p = 1 + r * (0.693147f + r * (0.24022242f +
                r * (0.05550734f + r * (0.009671513f + r * 0.0013264727f))));
#ifdef __AVX512F__
  return (lanes)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return (lanes)((bits)p + (exponent << 23));
#endif
}

/* e^-|x| */
INLINE lanes decayed(lanes x) { return power(LOG2E * choose(x < 0, x, -x)); }

INLINE lanes silu(lanes x) {
  lanes e = decayed(x);
  return x * choose(x < 0, e, all(1)) / (1 + e);
}

/* log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|, to 5e-7 of its value: log(1 + e) / e is a
   polynomial as in `power`, so that a small result keeps its digits. */
INLINE lanes softplus(lanes x) {
  lanes e = decayed(x);
  lanes p = 0.99999982f + e * (-0.49997404f + e * (0.33275479f + e * (-0.24495465f +
            e * (0.17745243f + e * (-0.10768173f + e * (0.044089638f - e * 0.0085392091f))))));
  return choose(x < 0, all(0), x) + e * p;
}

/* y = x w: so many rows of so many vectors, from rows of `inner` numbers, with the sums in
   registers. Rows of x, w and y lie so many numbers apart. */
INLINE void tile(const long rows, const long wide, long inner, const float *x, long x_apart,
                 const float *w, long w_apart, float *y, long y_apart) {
  lanes sum[ROWS][2] = {}, factor[2];
  for (long k = 0; k < inner; k++) {
    for (long j = 0; j < wide; j++) factor[j] = load(w + k * w_apart + j * LANES);
#pragma GCC unroll 16
    for (long r = 0; r < rows; r++)
      for (long j = 0; j < wide; j++) sum[r][j] += x[r * x_apart + k] * factor[j];
  }
#pragma GCC unroll 16
  for (long r = 0; r < rows; r++)
    for (long j = 0; j < wide; j++) store(y + r * y_apart + j * LANES, sum[r][j]);
}

/* All rows of a product, one or two vectors wide. */
INLINE void column(const long wide, long rows, long inner, const float *x, const float *w,
                   long w_apart, float *y, long y_apart) {
  long r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    tile(ROWS, wide, inner, x + r * inner, inner, w, w_apart, y + r * y_apart, y_apart);
  for (; r < rows; r++)
    tile(1, wide, inner, x + r * inner, inner, w, w_apart, y + r * y_apart, y_apart);
}

/* y (rows, columns) = x (rows, inner) w (inner, columns); rows of w lie so many numbers apart. */
static void product(long rows, long inner, long columns, const float *x, const float *w,
                    long w_apart, float *y) {
  for (long c = 0; c < columns; c += 2 * LANES) {
    long left = columns - c, wide = left > LANES ? 2 : 1;
    long from = left < wide * LANES ? columns - wide * LANES : c;  // the last one may overlap
    if (wide == 2) column(2, rows, inner, x, w + from, w_apart, y + from, columns);
    else column(1, rows, inner, x, w + from, w_apart, y + from, columns);
  }
}

typedef struct {
  const float *weight_in, *conv, *conv_bias, *weight_x, *weight_delta, *delta_bias, *rates, *D,
      *weight_out;
} Mixer;

typedef struct {
  const float *norm;
  Mixer coarse, fine;  // of fine all NULL where there is none
  const float *group, *group_bias, *fine_norm, *fine_norm_bias;
} Block;

typedef struct {
  long width, channels, rank, reach;
} Sizes;

/* Numbers that `mix` works on. */
static long needs(Sizes size, long length, long kept) {
  return (2 * length + size.reach - 1 + kept) * size.channels + length * (size.rank + 2 * STATES);
}

/* y (kept, width) = the last outputs of a mixer for x (length, width), 0 where mask (length) is. */
static void mix(Sizes size, Mixer m, long length, long kept, const float *x, const float *mask,
                float *room, float *y) {
  long E = size.channels, chosen = size.rank + 2 * STATES, first = length - kept;
  float *u = room + (size.reach - 1) * E, *step = u + length * E, *z = step + length * E,
        *s = z + kept * E;
  memset(room, 0, sizeof(float) * (u - room));  // the convolution begins with zeros
  product(length, size.width, E, x, m.weight_in, 2 * E, u);
  product(kept, size.width, E, x + first * size.width, m.weight_in + E, 2 * E, z);
  for (long t = length - 1; t >= 0; t--)  // backwards: earlier steps are still to be read
    for (long e = 0; e < E; e += LANES) {
      lanes sum = load(m.conv_bias + e);
      for (long k = 0; k < size.reach; k++)
        sum += load(u + (t - size.reach + 1 + k) * E + e) * load(m.conv + k * E + e);
      store(u + t * E + e, silu(sum));
    }
  product(length, E, chosen, u, m.weight_x, chosen, s);
  for (long t = 0; t < length; t++)
    for (long e = 0; e < E; e += LANES) {
      lanes sum = load(m.delta_bias + e);
      for (long r = 0; r < size.rank; r++)
        sum += s[t * chosen + r] * load(m.weight_delta + r * E + e);
      store(step + t * E + e, softplus(sum) * mask[t]);
    }
  for (long i = 0; i < kept * E; i += LANES) store(z + i, silu(load(z + i)));
  for (long e = 0; e < E; e += LANES) {  // states of these channels stay in registers
    lanes h[STATES] = {}, rate[STATES];
    for (long n = 0; n < STATES; n++) rate[n] = -LOG2E * load(m.rates + n * E + e);
    for (long t = 0; t < length; t++) {
      const float *B = s + t * chosen + size.rank, *C = B + STATES;
      lanes now = load(u + t * E + e), delta = load(step + t * E + e), in = delta * now;
#pragma GCC unroll 64
      for (long n = 0; n < STATES; n++) h[n] = power(delta * rate[n]) * h[n] + in * B[n];
      if (t < first) continue;
      lanes sum = now * load(m.D + e);
#pragma GCC unroll 64
      for (long n = 0; n < STATES; n++) sum += C[n] * h[n];
      float *to = z + (t - first) * E + e;
      store(to, sum * load(to));
    }
  }
  product(kept, E, size.width, z, m.weight_out, size.width, y);
}

/* to = x / its root mean square * weight */
static void rms_norm(long width, const float *x, const float *weight, float share, float *to) {
  float sum = 0;
  for (long e = 0; e < width; e++) sum += x[e] * x[e];
  share /= sqrtf(sum / width + 1e-5f);
  for (long e = 0; e < width; e++) to[e] = share * x[e] * weight[e];
}

/* x = (x - its mean) / its standard deviation * weight + bias */
static void layer_norm(long width, const float *weight, const float *bias, float *x) {
  float mean = 0, square = 0;
  for (long e = 0; e < width; e++) mean += x[e] / width;
  for (long e = 0; e < width; e++) square += (x[e] - mean) * (x[e] - mean);
  float share = 1 / sqrtf(square / width + 1e-5f);
  for (long e = 0; e < width; e++) x[e] = (x[e] - mean) * share * weight[e] + bias[e];
}

/* h (3 steps, width) += what a block adds, at the last `kept` steps; masks of steps, of tokens. */
static void block(Sizes size, Block b, long steps, long kept, const float *real,
                  const float *tokens, float *room, float *h) {
  long width = size.width;
  float *normed = room + width, *groups = normed + 3 * steps * width,
        *out = groups + steps * width, *rest = out + 3 * kept * width;
  memset(room, 0, sizeof(float) * width);  // what precedes the first token
  for (long t = 0; t < 3 * steps; t++)
    rms_norm(width, h + t * width, b.norm, tokens[t], normed + t * width);
  h += 3 * (steps - kept) * width;
  mix(size, b.coarse, 3 * steps, 3 * kept, normed, tokens, rest, out);
  for (long i = 0; i < 3 * kept * width; i++) h[i] += out[i];
  if (!b.group) return;
  product(steps, 3 * width, width, room, b.group, width, groups);  // from one token earlier on
  for (long t = 0; t < steps; t++)
    for (long e = 0; e < width; e++)
      groups[t * width + e] = real[t] * (groups[t * width + e] + b.group_bias[e]);
  mix(size, b.fine, steps, kept, groups, real, rest, out);
  for (long t = 0; t < kept; t++) {
    layer_norm(width, b.fine_norm, b.fine_norm_bias, out + t * width);
    for (long k = 3 * t; k < 3 * t + 3; k++)
      for (long e = 0; e < width; e++) h[k * width + e] += out[t * width + e];
  }
}

/* y (batch, 3 kept, width) = the last outputs for x (batch, 3 steps, width), which is overwritten;
   mask (batch, steps). Returns 1 where memory is short.

   Block after block, not window after window: the weights of one stay in cache, those of all might
   not. Pads that a window begins with are passed over, for they change nothing. */
int backbone(long batch, long steps, int threads, Sizes size, long layers, long kept, float *x,
             const float *mask, const Block *blocks, const float *norm, float *y) {
  long tokens = 3 * steps, width = size.width, whole = tokens * width, asked = 3 * kept * width;
  long count = tokens + 2 * whole + (1 + steps) * width + needs(size, tokens, tokens);
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    float *spread = malloc(sizeof(float) * count), *room = spread + tokens;
    failed = spread == NULL;
    for (long i = 0; i < layers; i++)
#pragma omp for
      for (long b = 0; b < batch; b++) {
        if (failed) continue;
        const float *real = mask + b * steps;
        long pads = 0, last = i == layers - 1;
        for (long t = 0; t < tokens; t++) spread[t] = real[t / 3];
        while (pads < steps - kept && !real[pads]) pads++;
        block(size, blocks[i], steps - pads, last ? kept : steps - pads, real + pads,
              spread + 3 * pads, room, x + b * whole + 3 * pads * width);
        for (long k = 0; last && k < asked; k += width)
          rms_norm(width, x + (b + 1) * whole - asked + k, norm, 1, y + b * asked + k);
      }
    free(spread);
  }
  return failed;
}
