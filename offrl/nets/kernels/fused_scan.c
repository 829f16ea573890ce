/* The selective scan of one float type `real` and of STATES states, both given when compiling.

   u, delta, y (batch, length, channels); A (channels, STATES); B, C (batch, length, STATES);
   D (channels). The state of a channel stays in registers; the backward pass runs the recurrence
   again and keeps the states of one channel only. Rows of the batch are split among threads, and
   no sum crosses rows (dA and dD come out per row), so the number of threads changes no bit. */

#include <stdlib.h>
#include <string.h>

#pragma omp declare simd notinbranch
real exponential(real);

void forward(long batch, long length, long channels, int threads, const real *u, const real *delta,
             const real *A, const real *B, const real *C, const real *D, real *y) {
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < batch; b++)
    for (long e = 0; e < channels; e++) {
      real h[STATES] = {0};
      for (long t = 0; t < length; t++) {
        long row = b * length + t, i = row * channels + e;
        const real *a = A + e * STATES, *in = B + row * STATES, *out = C + row * STATES;
        real step = delta[i], input = step * u[i], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int n = 0; n < STATES; n++) {
          h[n] = exponential(step * a[n]) * h[n] + input * in[n];
          sum += out[n] * h[n];
        }
        y[i] = sum + D[e] * u[i];
      }
    }
}

/* dA (batch, channels, STATES) and dD (batch, channels) are still to be summed over the batch.
   Returns 1 where memory for the states of a channel is missing. */
int backward(long batch, long length, long channels, int threads, const real *u, const real *delta,
             const real *A, const real *B, const real *C, const real *D, const real *dy, real *du,
             real *ddelta, real *dA, real *dB, real *dC, real *dD) {
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    /* states[0]: before step 0; aligned, so that no row of 16 crosses a cache line */
    real *states = aligned_alloc(64, sizeof(real) * (2 * length + 1) * STATES);
    real *decays = states + (length + 1) * STATES;
    failed = states == NULL;
#pragma omp for
    for (long b = 0; b < batch; b++) {
      if (failed) continue;
      memset(dB + b * length * STATES, 0, sizeof(real) * length * STATES);
      memset(dC + b * length * STATES, 0, sizeof(real) * length * STATES);
      for (long e = 0; e < channels; e++) {
        const real *a = A + e * STATES;
        memset(states, 0, sizeof(real) * STATES);
        for (long t = 0; t < length; t++) {
          long row = b * length + t, i = row * channels + e;
          const real *in = B + row * STATES;
          real *h = states + t * STATES, *decay = decays + t * STATES;
          real step = delta[i], input = step * u[i];
#pragma omp simd
          for (int n = 0; n < STATES; n++) {
            decay[n] = exponential(step * a[n]);
            h[STATES + n] = decay[n] * h[n] + input * in[n];
          }
        }
        real g[STATES] = {0}, da[STATES] = {0}, dd = 0; /* g: gradient at the state */
        for (long t = length - 1; t >= 0; t--) {
          long row = b * length + t, i = row * channels + e;
          const real *in = B + row * STATES, *out = C + row * STATES;
          const real *h = states + t * STATES, *decay = decays + t * STATES;
          real *din = dB + row * STATES, *dout = dC + row * STATES;
          real step = delta[i], input = step * u[i], dinput = 0, dstep = 0, gy = dy[i];
#pragma omp simd reduction(+ : dinput, dstep)
          for (int n = 0; n < STATES; n++) {
            g[n] += gy * out[n];
            dout[n] += gy * h[STATES + n];
            din[n] += g[n] * input;
            dinput += g[n] * in[n];
            g[n] *= decay[n];
            real drate = g[n] * h[n]; /* gradient at step * a */
            dstep += drate * a[n];
            da[n] += drate * step;
          }
          dd += gy * u[i];
          du[i] = dinput * step + gy * D[e];
          ddelta[i] = dinput * u[i] + dstep;
        }
        memcpy(dA + (b * channels + e) * STATES, da, sizeof da);
        dD[b * channels + e] = dd;
      }
    }
    free(states);
  }
  return failed;
}
