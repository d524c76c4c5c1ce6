/* Parts of a training step that do little with much memory, each in one pass over it. Built by cpu_kernels.py.

   Every function takes rows of bfloat16 or float32 numbers, computes in float32, and rounds once. Sums of a row are
   of that row alone and in one order, so that neither the number of threads nor the other rows change a bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>

typedef uint16_t bf16;

static inline float from_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline uint32_t to_bits(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

static inline float load_bf16(bf16 number) { return from_bits((uint32_t)number << 16); }
static inline float load_f32(float number) { return number; }

/* To the nearest, ties to even; what is no number stays none. */
static inline bf16 store_bf16(float number) {
    uint32_t bits = to_bits(number);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
static inline float store_f32(float number) { return number; }

/* Cephes' polynomial: within two units of the last place, and 0 below -87. */
static inline float exponential(float x) {
    float bounded = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
    float shifted = bounded * 1.44269504f + 12582912.0f;
    float whole = shifted - 12582912.0f;
    float rest = bounded - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    float power = from_bits((uint32_t)((int32_t)whole + 127) << 23);
    float result = sum * power;
    return x < -87.3f ? 0.0f : (x != x ? x : result);
}

int threads(void) { return omp_get_max_threads(); }

#define KERNELS(TYPE, NAME)                                                                                            \
                                                                                                                       \
/* y = x / rms(x) * w; `scale` keeps 1 / rms(x). */                                                                    \
void rms_##NAME(const TYPE *x, const TYPE *w, TYPE *y, float *scale, int64_t rows, int64_t wide, float epsilon) {      \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t row = 0; row < rows; row++) {                                                                         \
        const TYPE *in = x + row * wide;                                                                               \
        TYPE *out = y + row * wide;                                                                                    \
        float squares = 0.0f;                                                                                          \
        _Pragma("omp simd reduction(+ : squares)")                                                                     \
        for (int64_t i = 0; i < wide; i++) {                                                                           \
            float number = load_##NAME(in[i]);                                                                         \
            squares += number * number;                                                                                \
        }                                                                                                              \
        float factor = 1.0f / sqrtf(squares / (float)wide + epsilon);                                                  \
        scale[row] = factor;                                                                                           \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < wide; i++)                                                                             \
            out[i] = store_##NAME(load_##NAME(in[i]) * factor * load_##NAME(w[i]));                                    \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
void rms_back_##NAME(const TYPE *g, const TYPE *x, const TYPE *w, const float *scale, TYPE *dx, int64_t rows,          \
                     int64_t wide) {                                                                                   \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t row = 0; row < rows; row++) {                                                                         \
        const TYPE *in = x + row * wide, *grad = g + row * wide;                                                       \
        TYPE *out = dx + row * wide;                                                                                   \
        float along = 0.0f, factor = scale[row];                                                                       \
        _Pragma("omp simd reduction(+ : along)")                                                                       \
        for (int64_t i = 0; i < wide; i++) along += load_##NAME(grad[i]) * load_##NAME(w[i]) * load_##NAME(in[i]);     \
        float back = along * factor * factor / (float)wide;                                                            \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < wide; i++)                                                                             \
            out[i] = store_##NAME(                                                                                     \
                factor * (load_##NAME(grad[i]) * load_##NAME(w[i]) - back * load_##NAME(in[i])));                      \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* y = silu(a) * b. Rows of a and b begin `apart` numbers after each other, and so do those of their gradients. */     \
void swiglu_##NAME(const TYPE *a, const TYPE *b, TYPE *y, int64_t rows, int64_t wide, int64_t apart) {                 \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t row = 0; row < rows; row++) {                                                                         \
        const TYPE *gates = a + row * apart, *ups = b + row * apart;                                                   \
        TYPE *out = y + row * wide;                                                                                    \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < wide; i++) {                                                                           \
            float gate = load_##NAME(gates[i]);                                                                        \
            out[i] = store_##NAME(gate / (1.0f + exponential(-gate)) * load_##NAME(ups[i]));                           \
        }                                                                                                              \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
void swiglu_back_##NAME(const TYPE *g, const TYPE *a, const TYPE *b, TYPE *da, TYPE *db, int64_t rows, int64_t wide,   \
                        int64_t apart) {                                                                               \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t row = 0; row < rows; row++) {                                                                         \
        const TYPE *grads = g + row * wide, *gates = a + row * apart, *ups = b + row * apart;                          \
        TYPE *to_gates = da + row * apart, *to_ups = db + row * apart;                                                 \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < wide; i++) {                                                                           \
            float gate = load_##NAME(gates[i]), grad = load_##NAME(grads[i]);                                          \
            float open = 1.0f / (1.0f + exponential(-gate));                                                           \
            to_gates[i] = store_##NAME(grad * load_##NAME(ups[i]) * open * (1.0f + gate * (1.0f - open)));             \
            to_ups[i] = store_##NAME(grad * gate * open);                                                              \
        }                                                                                                              \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* Positions, heads, numbers of a head; `by_place`, `by_head`: strides of x. The result has places first. `turn` is    \
   1, or -1 for the gradient, which turns the other way. */                                                            \
void rotary_##NAME(const TYPE *x, const TYPE *cosine, const TYPE *sine, TYPE *y, int64_t places, int64_t heads,        \
                   int64_t size, int64_t by_place, int64_t by_head, float turn) {                                      \
    int64_t half = size / 2;                                                                                           \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t place = 0; place < places; place++) {                                                                 \
        const TYPE *c = cosine + place * size, *s = sine + place * size;                                               \
        for (int64_t head = 0; head < heads; head++) {                                                                 \
            const TYPE *in = x + place * by_place + head * by_head;                                                    \
            TYPE *out = y + (place * heads + head) * size;                                                             \
            if (turn > 0.0f) {                                                                                         \
                _Pragma("omp simd")                                                                                    \
                for (int64_t i = 0; i < half; i++) {                                                                   \
                    float one = load_##NAME(in[i]), two = load_##NAME(in[i + half]);                                   \
                    out[i] = store_##NAME(one * load_##NAME(c[i]) - two * load_##NAME(s[i]));                          \
                    out[i + half] = store_##NAME(two * load_##NAME(c[i + half]) + one * load_##NAME(s[i + half]));     \
                }                                                                                                      \
            } else {                                                                                                   \
                _Pragma("omp simd")                                                                                    \
                for (int64_t i = 0; i < half; i++) {                                                                   \
                    float one = load_##NAME(in[i]), two = load_##NAME(in[i + half]);                                   \
                    out[i] = store_##NAME(one * load_##NAME(c[i]) + two * load_##NAME(s[i + half]));                   \
                    out[i + half] = store_##NAME(two * load_##NAME(c[i + half]) - one * load_##NAME(s[i]));            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* In place: scores become weights, each place's over the `before` keys and the places up to its own; else 0. */       \
void weigh_##NAME(TYPE *scores, int64_t squares, int64_t places, int64_t before, float scaling) {                      \
    int64_t keys = before + places;                                                                                    \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t line = 0; line < squares * places; line++) {                                                          \
        TYPE *row = scores + line * keys;                                                                              \
        int64_t seen = before + line % places + 1;                                                                     \
        float most = load_##NAME(row[0]), sum = 0.0f, weights[seen];                                                   \
        _Pragma("omp simd reduction(max : most)")                                                                      \
        for (int64_t i = 0; i < seen; i++) most = load_##NAME(row[i]) > most ? load_##NAME(row[i]) : most;             \
        _Pragma("omp simd reduction(+ : sum)")                                                                         \
        for (int64_t i = 0; i < seen; i++) {                                                                           \
            weights[i] = exponential((load_##NAME(row[i]) - most) * scaling);                                          \
            sum += weights[i];                                                                                         \
        }                                                                                                              \
        float share = 1.0f / sum;                                                                                      \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < seen; i++) row[i] = store_##NAME(weights[i] * share);                                  \
        memset(row + seen, 0, (size_t)(keys - seen) * sizeof(TYPE));                                                   \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* In place: gradients of weights become gradients of scores. */                                                       \
void weigh_back_##NAME(TYPE *grads, const TYPE *weights, int64_t squares, int64_t places, int64_t before,              \
                       float scaling) {                                                                                \
    int64_t keys = before + places;                                                                                    \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t line = 0; line < squares * places; line++) {                                                          \
        TYPE *row = grads + line * keys;                                                                               \
        const TYPE *share = weights + line * keys;                                                                     \
        int64_t seen = before + line % places + 1;                                                                     \
        float sum = 0.0f;                                                                                              \
        _Pragma("omp simd reduction(+ : sum)")                                                                         \
        for (int64_t i = 0; i < seen; i++) sum += load_##NAME(row[i]) * load_##NAME(share[i]);                         \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < seen; i++)                                                                             \
            row[i] = store_##NAME(load_##NAME(share[i]) * (load_##NAME(row[i]) - sum) * scaling);                      \
        memset(row + seen, 0, (size_t)(keys - seen) * sizeof(TYPE));                                                   \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* Cross-entropy of each row, whether its target is the first of the greatest, and (not NULL) the gradient. */         \
void nll_##NAME(const TYPE *logits, const int64_t *targets, float *losses, uint8_t *right, TYPE *grads, int64_t rows,  \
                int64_t wide) {                                                                                        \
    _Pragma("omp parallel for schedule(static)")                                                                       \
    for (int64_t row = 0; row < rows; row++) {                                                                         \
        const TYPE *in = logits + row * wide;                                                                          \
        int64_t target = targets[row];                                                                                 \
        float most = load_##NAME(in[0]), earlier = -INFINITY, sum = 0.0f, wanted = load_##NAME(in[target]);            \
        _Pragma("omp simd reduction(max : most)")                                                                      \
        for (int64_t i = 0; i < wide; i++) most = load_##NAME(in[i]) > most ? load_##NAME(in[i]) : most;               \
        _Pragma("omp simd reduction(max : earlier)")                                                                   \
        for (int64_t i = 0; i < target; i++) earlier = load_##NAME(in[i]) > earlier ? load_##NAME(in[i]) : earlier;    \
        _Pragma("omp simd reduction(+ : sum)")                                                                         \
        for (int64_t i = 0; i < wide; i++) sum += exponential(load_##NAME(in[i]) - most);                              \
        float all = most + logf(sum);                                                                                  \
        losses[row] = all - wanted;                                                                                    \
        right[row] = wanted == most && earlier < most;                                                                 \
        if (grads == NULL) continue;                                                                                   \
        TYPE *out = grads + row * wide;                                                                                \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < wide; i++) out[i] = store_##NAME(exponential(load_##NAME(in[i]) - all));               \
        out[target] = store_##NAME(exponential(wanted - all) - 1.0f);                                                  \
    }                                                                                                                  \
}

KERNELS(bf16, bf16)
KERNELS(float, f32)

#include "cpu_attention.c"
