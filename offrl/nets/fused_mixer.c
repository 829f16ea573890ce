/* A Mamba mixer between its matrix products: one pass over the data each, without gradients.

   x, u (batch, length, channels); mask (batch, length) or NULL. The loops over channels are
   innermost, where they become vector instructions. Rows of the batch are split among threads, and
   no sum crosses rows, so the number of threads changes no bit. */

#include <math.h>
#include <string.h>

#define LOG2E 1.44269504f

/* 2^x to 3e-7 of its value, x held within [-126, 127]; 1 at 0. The polynomial is a fit of least
   relative error to 2^r on [-1/2, 1/2]; whole numbers are added to the exponent's bits. */
static inline float power(float x) {
  x = x < -126 ? -126 : x > 127 ? 127 : x;
  float whole = rintf(x), r = x - whole;
  float p = 1 + r * (0.693147f + r * (0.24022242f +
                r * (0.05550734f + r * (0.009671513f + r * 0.0013264727f))));
  int bits;
  memcpy(&bits, &p, sizeof bits);
  bits += (int)whole << 23;
  memcpy(&p, &bits, sizeof p);
  return p;
}

static inline float silu(float x) { return x / (1 + power(-LOG2E * x)); }

/* log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|; log(1 + e) = 2 artanh(s), s = e / (2 + e),
   as a series in s, which is at most 1/3: a small result keeps its digits. */
static inline float softplus(float x) {
  float e = power(LOG2E * (x < 0 ? x : -x)), s = e / (2 + e), q = s * s;
  float series =
      1 + q * (1 / 3.f + q * (1 / 5.f + q * (1 / 7.f + q * (1 / 9.f + q * (1 / 11.f + q / 13)))));
  return (x < 0 ? 0 : x) + 2 * s * series;
}

/* u = SiLU of the causal convolution of x with weight (reach, channels) and bias (channels). */
void convolve(long batch, long length, long channels, int threads, long reach, const float *x,
              const float *mask, const float *weight, const float *bias, float *u) {
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < batch; b++)
    for (long t = 0; t < length; t++) {
      float *to = u + (b * length + t) * channels;
      memcpy(to, bias, sizeof(float) * channels);
      for (long k = t < reach - 1 ? reach - 1 - t : 0; k < reach; k++) {
        long row = b * length + t - (reach - 1) + k;
        float share = mask ? mask[row] : 1;
        const float *from = x + row * channels, *tap = weight + k * channels;
        for (long e = 0; e < channels; e++) to[e] += share * from[e] * tap[e];
      }
      for (long e = 0; e < channels; e++) to[e] = silu(to[e]);
    }
}

/* y = SiLU(z) times the selective scan of u, at the last `kept` steps: y, z (batch, kept, channels).

   selected (batch, length, rank + 2 states) holds the rates of the step size, B and C of each step;
   weight (rank, channels) and bias (channels) make the step size of its rates; A (states, channels)
   and D (channels) are the scan's. */
void scan(long batch, long length, long channels, int threads, long states, long rank, long kept,
          const float *u, const float *z, const float *selected, const float *mask, const float *weight,
          const float *bias, const float *A, const float *D, float *y) {
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < batch; b++) {
    float h[states * channels], step[channels], input[channels], sum[channels];
    memset(h, 0, sizeof h);
    for (long t = 0; t < length; t++) {
      long row = b * length + t, to = (b * kept + t - (length - kept)) * channels;
      const float *rates = selected + row * (rank + 2 * states), *now = u + row * channels;
      const float *in = rates + rank, *out = in + states;
      memcpy(step, bias, sizeof step);
      for (long r = 0; r < rank; r++)
        for (long e = 0; e < channels; e++) step[e] += rates[r] * weight[r * channels + e];
      float share = mask ? mask[row] : 1;
      for (long e = 0; e < channels; e++) {
        step[e] = share * softplus(step[e]);
        input[e] = step[e] * now[e];
        sum[e] = D[e] * now[e];
        step[e] *= LOG2E;
      }
      for (long n = 0; n < states; n++)
        for (long e = 0; e < channels; e++) {
          long i = n * channels + e;
          h[i] = power(step[e] * A[i]) * h[i] + input[e] * in[n];
          sum[e] += out[n] * h[i];
        }
      if (t < length - kept) continue;
      for (long e = 0; e < channels; e++) y[to + e] = sum[e] * silu(z[to + e]);
    }
  }
}
