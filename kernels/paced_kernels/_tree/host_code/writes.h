/* Writes: weights in fixed point, 2^27 = 1, one by one or all of them, from weights or by a bell of statistics. */

enum { IS_FLOAT, IS_DOUBLE, IS_INT, IS_LONG };
enum { NAN_FOUND, NEGATIVE, SATURATED, OUT_OF_RANGE, EMPTY, SHORT, REPEATS }; /* the fields of the status */
enum { BLOCK = 512 };

#define ONE ((int64_t)1 << 27)

static inline int64_t quantise(double w) { /* NaN and below 0 become 0, above 1 become 1 */
    double kept = w > 1.0 ? 1.0 : w;
    kept = kept > 0.0 ? kept : 0.0;
    int64_t q = (int64_t)(as_bits(kept * (double)ONE + ROUNDER) & MASK_52);
    return q > 0 ? q : kept > 0.0;
}

/* Quantise valid weights; returns whether they all are. */
WIDE static int quantise_floats(const float *restrict from, int32_t *restrict to, int64_t num) {
    int bad = 0;
    for (int64_t i = 0; i < num; i++) {
        float w = from[i] >= 0.0f ? from[i] : -1.0f; /* a NaN too */
        w = w <= 1.0f ? w : -1.0f;
        int q = (int)rintf(w * (float)ONE), least = w > 0.0f ? 1 : 0; /* the product is exact */
        bad |= q;                                                      /* the sign */
        to[i] = q > least ? q : least;
    }
    return bad >= 0;
}

WIDE static int quantise_doubles(const double *restrict from, int32_t *restrict to, int64_t num) {
    int64_t bad = 0;
    for (int64_t i = 0; i < num; i++) {
        bad |= !((from[i] >= 0.0) & (from[i] <= 1.0));
        to[i] = (int32_t)quantise(from[i]);
    }
    return !bad;
}

/* The weight of any number, with what is wrong with that counted. */
static int64_t any_double(double w, int64_t *counts) {
    counts[NAN_FOUND] += w != w, counts[NEGATIVE] += w < 0.0, counts[SATURATED] += w > 1.0;
    return quantise(w);
}

static int64_t any_integer(int64_t q, int64_t *counts) {
    counts[NEGATIVE] += q < 0, counts[SATURATED] += q > ONE;
    return q < 0 ? 0 : q > ONE ? ONE : q;
}

static int64_t quantise_at(const void *from, int kind, int64_t at, int64_t *counts) {
    switch (kind) {
    case IS_FLOAT: return any_double(((const float *)from)[at], counts);
    case IS_DOUBLE: return any_double(((const double *)from)[at], counts);
    case IS_INT: return any_integer(((const int32_t *)from)[at], counts);
    default: return any_integer(((const int64_t *)from)[at], counts);
    }
}

/* Quantise weights if all are valid; returns whether they are. */
static int quantise_valid(const void *from, int kind, int32_t *to, int64_t num) {
    if (kind == IS_FLOAT) return quantise_floats(from, to, num);
    if (kind == IS_DOUBLE) return quantise_doubles(from, to, num);
    int64_t counts[3] = {0};
    for (int64_t i = 0; i < num; i++) to[i] = (int32_t)quantise_at(from, kind, i, counts);
    return !(counts[0] | counts[1] | counts[2]);
}

typedef struct {
    double center, width;
} Bell;

/* The weight of a statistic, as `Bell` has it; NaN of NaN. */
static double weight_of(double statistic, const Bell *bell) {
    double distance = (statistic - bell->center) / bell->width;
    double t = distance * distance * 0.5;
    return exp_of_negative(t > 40.0 ? 40.0 : t);
}

/* Quantise the weights of statistics by a shorter formula, off by less than 2^-14 of an integer; -1 where that may be
 * too much, and of NaN. Returns whether there are none of these. */
#define SHAPE_ALL(name, type)                                                                              \
    WIDE static int name(const type *restrict from, int32_t *restrict to, int64_t num, const Bell *bell) { \
        const double factor = 0.5 * 1.4426950408889634 / (bell->width * bell->width);                      \
        const double center = bell->center, bias = 1.5 * ROUNDER;                                          \
        int open = 0;                                                                                      \
        for (int64_t i = 0; i < num; i++) {                                                                \
            double distance = (double)from[i] - center, t = distance * distance * factor;                  \
            double power = 27.0 - (t > 40.0 ? 40.0 : t), biased = power + bias;                            \
            double f = (power - (biased - bias)) * 0.6931471805599453; /* its integer is in biased */      \
            double made = 1.0 / 3628800.0;                                                                 \
            made = made * f + 1.0 / 362880.0;                                                              \
            made = made * f + 1.0 / 40320.0;                                                               \
            made = made * f + 1.0 / 5040.0;                                                                \
            made = made * f + 1.0 / 720.0;                                                                 \
            made = made * f + 1.0 / 120.0;                                                                 \
            made = made * f + 1.0 / 24.0;                                                                  \
            made = made * f + 1.0 / 6.0;                                                                   \
            made = made * f + 0.5;                                                                         \
            made = made * f + 1.0;                                                                         \
            made = made * f + 1.0;                                                                         \
            made = as_double(as_bits(made) + (as_bits(biased) << 52));                                     \
            double rounded = made + ROUNDER;                                                               \
            int32_t q = (int32_t)(as_bits(rounded) & MASK_52);                                             \
            int is_sure = fabs((rounded - ROUNDER) - made) <= 0.5 - 0x1p-13;                           \
            to[i] = is_sure ? (q > 1 ? q : 1) : -1;                                                        \
            open |= !is_sure;                                                                              \
        }                                                                                                  \
        return !open;                                                                                      \
    }

SHAPE_ALL(shape_floats, float)
SHAPE_ALL(shape_doubles, double)

static const size_t SIZE_OF[] = {4, 8, 4, 8};

/* Write every leaf: weights, or a bell of statistics; 0 where not `allowed`, if that is given. */
static void rebuild(
    const Tree *tree, const char *from, int kind, const Bell *bell, const char *allowed, int64_t *counts
) {
    int64_t live = 0;
    for (int64_t first = 0; first < tree->capacity; first += BLOCK) {
        int64_t num = tree->capacity - first < BLOCK ? tree->capacity - first : BLOCK;
        int32_t *leaf = tree->leaf + first;
        const void *given = from + first * SIZE_OF[kind];
        int is_done = !bell ? quantise_valid(given, kind, leaf, num)
                      : kind == IS_FLOAT ? shape_floats(given, leaf, num, bell)
                                         : shape_doubles(given, leaf, num, bell);
        for (int64_t i = 0; !is_done && i < num; i++) {
            if (allowed && !allowed[first + i]) continue; /* what is not allowed is not counted */
            if (!bell) leaf[i] = (int32_t)quantise_at(given, kind, i, counts);
            else if (leaf[i] < 0)
                leaf[i] = (int32_t)any_double(
                    weight_of(kind == IS_FLOAT ? ((const float *)given)[i] : ((const double *)given)[i], bell), counts
                );
        }
        if (allowed)
            for (int64_t i = 0; i < num; i++) leaf[i] = allowed[first + i] ? leaf[i] : 0;
        live += count_live(leaf, (int)num);
    }
    *tree->num_live = live;
    sum_levels(tree, 0);
}

/* Write the leaves idx [B], or from `start` on round the end if there are no idx. */
static void update(
    const Tree *tree, const void *idx, int idx_kind, int64_t start, const char *weights, int kind, int64_t num, int64_t *status
) {
    int32_t q[BLOCK];
    int64_t live = 0;
    /* Levels with many more entries than there are writes take each difference; those above are summed again. */
    int kept = 1;
    while (kept < tree->levels && tree->count[kept - 1] > 4 * num) kept++;
    for (int64_t first = 0; first < num; first += BLOCK) {
        int64_t here = num - first < BLOCK ? num - first : BLOCK;
        const void *given = weights + first * SIZE_OF[kind];
        int is_valid = quantise_valid(given, kind, q, here);
        for (int64_t i = 0; i < here; i++) {
            int64_t at;
            if (!idx) {
                at = start + first + i;
                at -= at >= tree->capacity ? tree->capacity : 0;
            } else {
                at = idx_kind == IS_INT ? ((const int32_t *)idx)[first + i] : ((const int64_t *)idx)[first + i];
                if (at < 0 || at >= tree->capacity) { /* -1 is padding */
                    status[OUT_OF_RANGE] += at != -1;
                    continue;
                }
            }
            int64_t made = is_valid ? q[i] : quantise_at(given, kind, i, status); /* counted if it is written */
            int64_t before = tree->leaf[at], difference = made - before;
            tree->leaf[at] = (int32_t)made;
            live += (made > 0) - (before > 0);
            at >>= ROW_BITS;
            for (int k = 0; k < kept; k++, at >>= FAN_BITS) tree->level[k][at] += difference;
        }
    }
    *tree->num_live += live;
    sum_levels(tree, kept);
}
