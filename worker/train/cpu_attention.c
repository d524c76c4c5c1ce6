/* Attention of short packed rows, each to itself and to the beginning that all of a pass share. Included by
   cpu_kernels.c.

   A row's scores, its softmax and what it sees are computed where they stay in the processor's caches, and only up to
   the diagonal. Everything is float32 within; results are rounded once. A thread takes one head of one row at a time,
   and sums over rows have one order, so that the number of threads changes no bit.

   Segments of a pass: the shared beginning, if there is one (`starts[0]` places), then the rows, `starts[i]` to
   `starts[i + 1]`. The keys of a row are those of the beginning and then its own. */

/* Numbers of a vector, lines of a tile (held in registers), and the multiple of both that sizes are rounded up to. */
#if defined(__AVX512F__)
#define LANES 16
#define LINES 8
#define STEP 16
#elif defined(__AVX2__)
#define LANES 8
#define LINES 12
#define STEP 24
#else
#define LANES 4
#define LINES 12
#define STEP 12
#endif

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

static inline int64_t up_to(int64_t count, int64_t whole) { return (count + whole - 1) / whole * whole; }
static inline int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* c (LINES, LANES) = a (LINES, depth) by b (depth, LANES), added to what is there if `more`. */
static inline void tile(const float *a, int64_t by_line, int64_t by_depth, const float *b, int64_t wide, int64_t depth,
                        float *c, int64_t apart, int more) {
    lanes sums[LINES];
#pragma GCC unroll 12
    for (int line = 0; line < LINES; line++) sums[line] = more ? *(const lanes *)(c + line * apart) : (lanes){0};
    for (int64_t place = 0; place < depth; place++) {
        lanes right = *(const lanes *)(b + place * wide);
#pragma GCC unroll 12
        for (int line = 0; line < LINES; line++) sums[line] += a[line * by_line + place * by_depth] * right;
    }
#pragma GCC unroll 12
    for (int line = 0; line < LINES; line++) *(lanes *)(c + line * apart) = sums[line];
}

static inline void read_line(float *line, const void *from, int64_t place, int64_t size, int narrow, float factor) {
    if (narrow)
        for (int64_t i = 0; i < size; i++) line[i] = load_bf16(((const bf16 *)from)[place + i]) * factor;
    else
        for (int64_t i = 0; i < size; i++) line[i] = load_f32(((const float *)from)[place + i]) * factor;
}

static inline void write_line(void *to, int64_t place, const float *line, int64_t size, int narrow, float factor) {
    if (narrow)
        for (int64_t i = 0; i < size; i++) ((bf16 *)to)[place + i] = store_bf16(line[i] * factor);
    else
        for (int64_t i = 0; i < size; i++) ((float *)to)[place + i] = store_f32(line[i] * factor);
}

/* Where a segment begins, its own places, and those of the beginning that it sees before them. */
typedef struct {
    int64_t begin, own, before;
} segment;

static inline segment segment_of(const int64_t *starts, int64_t number) {
    int64_t shared = starts[0], row = number - (shared > 0);
    if (row < 0) return (segment){0, shared, 0};
    return (segment){starts[row], starts[row + 1] - starts[row], shared};
}

static inline int64_t place_of(segment part, int64_t key) {
    return key < part.before ? key : part.begin + key - part.before;
}

/* Keys or values with sizes first: (size, tall), zero behind the last. */
static inline void read_turned(float *turned, float *line, const void *from, segment part, int64_t tall, int64_t size,
                               int64_t by_place, int64_t offset, int narrow) {
    int64_t keys = part.before + part.own, whole = up_to(keys, STEP);
    for (int64_t key = 0; key < keys; key++) {
        read_line(line, from, place_of(part, key) * by_place + offset, size, narrow, 1.0f);
        for (int64_t i = 0; i < size; i++) turned[i * tall + key] = line[i];
    }
    for (int64_t i = 0; i < size; i++) memset(turned + i * tall + keys, 0, (size_t)(whole - keys) * 4);
}

/* Float numbers that one thread needs, for rows that see up to `longest` keys. */
int64_t attention_scratch(int64_t longest, int64_t size) {
    int64_t tall = up_to(longest, STEP), wide = up_to(size, LANES);
    return tall * (2 * size + 5 * wide + 2 * tall) + (LINES + 1) * (2 * wide + tall);
}

#define LAYOUT                                                                                                         \
    const int64_t *starts, int64_t rows, int64_t heads, int64_t groups, int64_t size, int64_t q_place, int64_t q_head, \
        int64_t k_place, int64_t k_head, int64_t v_place, int64_t v_head, int64_t longest, float scaling
#define LAID_OUT                                                                                                       \
    starts, rows, heads, groups, size, q_place, q_head, k_place, k_head, v_place, v_head, longest, scaling

/* out (places, heads, size); logs (heads, places): logarithms of the sums of the exponentials of scores. */
static void attend(int narrow, const void *q, const void *k, const void *v, void *out, float *logs, float *scratch,
                   LAYOUT) {
    int64_t tall = up_to(longest, STEP), wide = up_to(size, LANES), places = starts[rows];
    int64_t each = attention_scratch(longest, size), segments = rows + (starts[0] > 0);
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < segments * heads; task++) {
        segment part = segment_of(starts, task / heads);
        int64_t head = task % heads, group = head / (heads / groups), keys = part.before + part.own;
        float *keys_turned = scratch + omp_get_thread_num() * each, *values = keys_turned + size * tall;
        float *queries = values + tall * wide, *seen_values = queries + LINES * wide, *line = seen_values + LINES * wide;
        float *scores = line + wide;
        read_turned(keys_turned, line, k, part, tall, size, k_place, group * k_head, narrow);
        for (int64_t key = 0; key < keys; key++) {
            read_line(values + key * wide, v, place_of(part, key) * v_place + group * v_head, size, narrow, 1.0f);
            memset(values + key * wide + size, 0, (size_t)(wide - size) * 4);
        }
        for (int64_t first = 0; first < part.own; first += LINES) {
            int64_t lines = least(LINES, part.own - first), seen = part.before + first + lines;
            memset(queries, 0, (size_t)(LINES * wide) * 4);
            for (int64_t i = 0; i < lines; i++)
                read_line(queries + i * wide, q, (part.begin + first + i) * q_place + head * q_head, size, narrow, scaling);
            for (int64_t key = 0; key < seen; key += LANES)
                tile(queries, wide, 1, keys_turned + key, tall, size, scores + key, tall, 0);
            for (int64_t i = 0; i < lines; i++) {
                float *row = scores + i * tall, most = row[0], sum = 0.0f;
                int64_t count = part.before + first + i + 1;
#pragma omp simd reduction(max : most)
                for (int64_t key = 0; key < count; key++) most = row[key] > most ? row[key] : most;
#pragma omp simd reduction(+ : sum)
                for (int64_t key = 0; key < count; key++) {
                    row[key] = exponential(row[key] - most);
                    sum += row[key];
                }
                float share = 1.0f / sum;
                for (int64_t key = 0; key < count; key++) row[key] *= share;
                memset(row + count, 0, (size_t)(seen - count) * 4);
                logs[head * places + part.begin + first + i] = most + logf(sum);
            }
            for (int64_t i = 0; i < wide; i += LANES)
                tile(scores, tall, 1, values + i, wide, seen, seen_values + i, wide, 0);
            for (int64_t i = 0; i < lines; i++)
                write_line(out, ((part.begin + first + i) * heads + head) * size, seen_values + i * wide, size, narrow, 1.0f);
        }
    }
}

/* Gradients (places, heads or groups, size) from `g` (places, heads, size). `shared` (segments, groups, 2, starts[0],
   size) keeps what each segment gives to the beginning's keys and values, until it is summed in their order. */
static void attend_back(int narrow, const void *g, const void *q, const void *k, const void *v, const float *logs,
                        void *dq, void *dk, void *dv, float *scratch, float *shared, LAYOUT) {
    int64_t tall = up_to(longest, STEP), wide = up_to(size, LANES), places = starts[rows], beginning = starts[0];
    int64_t each = attention_scratch(longest, size), segments = rows + (beginning > 0), of_group = heads / groups;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < segments * groups; task++) {
        segment part = segment_of(starts, task / groups);
        int64_t group = task % groups, keys = part.before + part.own, whole = up_to(keys, STEP);
        float *keys_turned = scratch + omp_get_thread_num() * each, *values_turned = keys_turned + size * tall;
        float *key_lines = values_turned + size * tall, *queries = key_lines + tall * wide, *grads = queries + tall * wide;
        float *to_keys = grads + tall * wide, *to_values = to_keys + tall * wide;
        float *weights = to_values + tall * wide, *to_scores = weights + tall * tall, *line = to_scores + tall * tall;
        float *result = line + wide;
        read_turned(keys_turned, line, k, part, tall, size, k_place, group * k_head, narrow);
        read_turned(values_turned, line, v, part, tall, size, v_place, group * v_head, narrow);
        for (int64_t key = 0; key < keys; key++) {
            read_line(key_lines + key * wide, k, place_of(part, key) * k_place + group * k_head, size, narrow, 1.0f);
            memset(key_lines + key * wide + size, 0, (size_t)(wide - size) * 4);
        }
        memset(to_keys, 0, (size_t)(2 * tall * wide) * 4);
        memset(queries, 0, (size_t)(2 * tall * wide) * 4);
        for (int64_t head = group * of_group; head < (group + 1) * of_group; head++) {
            for (int64_t i = 0; i < part.own; i++) {
                int64_t place = part.begin + i;
                read_line(queries + i * wide, q, place * q_place + head * q_head, size, narrow, scaling);
                read_line(grads + i * wide, g, (place * heads + head) * size, size, narrow, 1.0f);
            }
            for (int64_t first = 0; first < part.own; first += LINES) {
                int64_t lines = least(LINES, part.own - first), seen = part.before + first + lines;
                for (int64_t key = 0; key < seen; key += LANES) {
                    tile(queries + first * wide, wide, 1, keys_turned + key, tall, size, weights + first * tall + key, tall, 0);
                    tile(grads + first * wide, wide, 1, values_turned + key, tall, size, to_scores + first * tall + key, tall, 0);
                }
                for (int64_t i = first; i < first + lines; i++) {
                    float *weight = weights + i * tall, *back = to_scores + i * tall, sum = 0.0f;
                    float log = logs[head * places + part.begin + i];
                    int64_t count = part.before + i + 1;
#pragma omp simd reduction(+ : sum)
                    for (int64_t key = 0; key < count; key++) {
                        weight[key] = exponential(weight[key] - log);
                        sum += weight[key] * back[key];
                    }
                    for (int64_t key = 0; key < count; key++) back[key] = weight[key] * (back[key] - sum);
                    memset(weight + count, 0, (size_t)(whole - count) * 4);
                    memset(back + count, 0, (size_t)(whole - count) * 4);
                }
                for (int64_t i = 0; i < wide; i += LANES)
                    tile(to_scores + first * tall, tall, 1, key_lines + i, wide, seen, result + i, wide, 0);
                for (int64_t i = 0; i < lines; i++)
                    write_line(dq, ((part.begin + first + i) * heads + head) * size, result + i * wide, size, narrow, scaling);
            }
            for (int64_t key = 0; key < keys; key += LINES) {
                int64_t from = key > part.before ? key - part.before : 0, depth = part.own - from;
                for (int64_t i = 0; i < wide; i += LANES) {
                    int64_t there = key * wide + i, square = from * tall + key;
                    tile(weights + square, 1, tall, grads + from * wide + i, wide, depth, to_values + there, wide, 1);
                    tile(to_scores + square, 1, tall, queries + from * wide + i, wide, depth, to_keys + there, wide, 1);
                }
            }
        }
        for (int64_t key = 0; key < keys; key++) {
            int64_t place = place_of(part, key);
            if (place < beginning) {
                float *kept = shared + (task * 2 * beginning + place) * size;
                memcpy(kept, to_keys + key * wide, (size_t)size * 4);
                memcpy(kept + beginning * size, to_values + key * wide, (size_t)size * 4);
            } else {
                write_line(dk, (place * groups + group) * size, to_keys + key * wide, size, narrow, 1.0f);
                write_line(dv, (place * groups + group) * size, to_values + key * wide, size, narrow, 1.0f);
            }
        }
    }
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < 2 * beginning * groups; task++) {
        int64_t which = task % 2, group = task / 2 % groups, place = task / 2 / groups;
        float *first = shared + ((group * 2 + which) * beginning + place) * size;
        for (int64_t number = 1; number < segments; number++) {
            const float *more = shared + (((number * groups + group) * 2 + which) * beginning + place) * size;
            for (int64_t i = 0; i < size; i++) first[i] += more[i];
        }
        write_line(which ? dv : dk, (place * groups + group) * size, first, size, narrow, 1.0f);
    }
}

#define ATTENTION(TYPE, NAME, NARROW)                                                                                  \
    void attend_##NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *out, float *logs, float *scratch, LAYOUT) {  \
        attend(NARROW, q, k, v, out, logs, scratch, LAID_OUT);                                                         \
    }                                                                                                                  \
    void attend_back_##NAME(const TYPE *g, const TYPE *q, const TYPE *k, const TYPE *v, const float *logs, TYPE *dq,   \
                            TYPE *dk, TYPE *dv, float *scratch, float *shared, LAYOUT) {                               \
        attend_back(NARROW, g, q, k, v, logs, dq, dk, dv, scratch, shared, LAID_OUT);                                  \
    }

ATTENTION(bf16, bf16, 1)
ATTENTION(float, f32, 0)
