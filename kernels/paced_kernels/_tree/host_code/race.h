/* A race: the B smallest of the keys -log(u) / p, as `race_keys` and `race_winners` of `arithmetic` make them. */

static inline void swap(uint64_t *a, uint64_t *b) {
    uint64_t kept = *a;
    *a = *b, *b = kept;
}

/* Part keys in two, none of the first above one of the second; returns where the second begins, inside. */
static int64_t part(uint64_t *key, int64_t num) {
    uint64_t a = key[0], b = key[num / 2], c = key[num - 1];
    uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    int64_t low = 0, high = num - 1;
    for (;; low++, high--) {
        while (key[low] < pivot) low++;
        while (key[high] > pivot) high--;
        if (low >= high) return low > 0 ? low : 1;
        swap(&key[low], &key[high]);
    }
}

static void insert_all(uint64_t *key, int64_t num) {
    for (int64_t i = 1; i < num; i++) {
        uint64_t here = key[i];
        int64_t j = i;
        for (; j > 0 && key[j - 1] > here; j--) key[j] = key[j - 1];
        key[j] = here;
    }
}

/* Sort so that the first `wanted` of the keys are the smallest of all, in any order. */
static void keep_smallest(uint64_t *key, int64_t num, int64_t wanted) {
    while (num > 16 && wanted > 0 && wanted < num) {
        int64_t left = part(key, num);
        if (wanted < left) num = left;
        else key += left, num -= left, wanted -= left;
    }
    if (wanted > 0 && wanted < num) insert_all(key, num);
}

static void sort_all(uint64_t *key, int64_t num) {
    while (num > 16) {
        int64_t left = part(key, num);
        if (left < num - left) {
            sort_all(key, left);
            key += left, num -= left;
        } else {
            sort_all(key + left, num - left);
            num = left;
        }
    }
    insert_all(key, num);
}

/* Mark the leaves from `first` on whose key may be below a limit: -log(u) is at least 1 - u, so the key is at least
 * (1 - u) / p. `slope` and `even` are p's, times the limit and 2^52, rounded up. */
WIDE static void mark_near(
    const int32_t *restrict q, int64_t num, uint64_t start, uint64_t first, double slope, double even, uint8_t *restrict near
) {
    uint64_t words[BLOCK];
    for (int64_t i = 0; i < num; i++) words[i] = random_bits(start, first + (uint64_t)i);
    for (int64_t i = 0; i < num; i++) {
        /* 1 - u is a multiple of 2^-53; half of it, rounded down, fits into a double's fraction. */
        uint64_t half = (~words[i] ^ SIGN) >> 12;
        double off = as_double(half | ROUNDER_BITS) - ROUNDER;
        near[i] = off <= (double)q[i] * slope + even;
    }
}

typedef struct {
    int64_t num_live, sum_q; /* of the weights that draws are made by */
    double exploration;
    uint64_t start, mask;
} Race;

static inline uint64_t key_of(const Race *race, int64_t q, uint64_t leaf) {
    double weight = (double)q;
    if (race->exploration > 0.0) {
        double near = weight / (double)(race->sum_q > 1 ? race->sum_q : 1) * (1.0 - race->exploration);
        weight = near + 1.0 / (double)(race->num_live > 1 ? race->num_live : 1) * race->exploration;
    }
    if (!(weight > 0.0)) return UINT64_MAX;
    return (as_bits((0.0 - log_of_unit(unit_interval(random_bits(race->start, leaf)))) / weight) & ~race->mask) | leaf;
}

static int race_distinct(const Tree *tree, int64_t num, double exploration, const State *state, const Drawn *drawn) {
    int64_t total = total_of(tree), prefix = prefix_of(tree, state->size);
    Race race = {total ? *tree->num_live : prefix, total ? total : prefix, exploration, state->start, 0};
    while (race.mask < (uint64_t)tree->capacity - 1) race.mask = race.mask << 1 | 1;
    state->status[EMPTY] += total == 0;
    int64_t behind = total ? tree->capacity : prefix, wanted = num < race.num_live ? num : race.num_live, held = 0;
    /* Twice as many as are wanted, and a block, so that what is out is taken away now and then. */
    uint64_t *key = malloc((2 * (uint64_t)wanted + BLOCK) * sizeof *key);
    if (!key) return 0;
    double slope = INFINITY, even = INFINITY;
    const double sum_q = (double)(race.sum_q > 1 ? race.sum_q : 1), live = (double)(race.num_live > 1 ? race.num_live : 1);
    for (int64_t first = 0; first < behind && wanted > 0; first += BLOCK) {
        int64_t here = behind - first < BLOCK ? behind - first : BLOCK;
        int32_t ones[BLOCK];
        const int32_t *q = tree->leaf + first;
        uint8_t near[BLOCK];
        if (!total) {
            for (int64_t i = 0; i < here; i++) ones[i] = 1;
            q = ones;
        }
        if (slope < INFINITY) mark_near(q, here, race.start, (uint64_t)first, slope, even, near);
        else memset(near, 1, sizeof near);
        for (int64_t i = 0; i < here; i++) {
            uint64_t eight;
            if (i + 8 <= here && (memcpy(&eight, near + i, 8), eight == 0)) {
                i += 7;
                continue;
            }
            if (!near[i] || q[i] <= 0) continue;
            uint64_t made = key_of(&race, q[i], (uint64_t)(first + i));
            if (made < UINT64_MAX) key[held++] = made;
        }
        if (held >= 2 * wanted) {
            keep_smallest(key, held, wanted);
            held = wanted;
            uint64_t last = 0;
            for (int64_t i = 0; i < wanted; i++) last = key[i] > last ? key[i] : last;
            /* The index in a key makes it less than its quotient by up to the mask; p and a logarithm are rounded. */
            double limit = as_double(last | race.mask) * 0x1p52 * (1.0 + 1e-9);
            slope = exploration > 0.0 ? (1.0 - exploration) / sum_q * limit : limit;
            even = exploration > 0.0 ? exploration / live * limit : 0.0;
        }
    }
    if (held > wanted) keep_smallest(key, held, wanted);
    if (held > wanted) held = wanted;
    sort_all(key, held);
    for (int64_t i = 0; i < num; i++) drawn->idx[i] = i < held ? (int64_t)(key[i] & race.mask) : -1;
    free(key);
    state->status[SHORT] += held < num;
    finish(tree, drawn, num, state->size);
    return 1;
}
