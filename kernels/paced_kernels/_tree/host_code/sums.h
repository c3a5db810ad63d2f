/* Sums of the leaves, in levels, and the leaves that hold targets.
 *
 * An entry of the first level is the sum of a row of leaves, an entry of the next the sum of FAN of those, up to one
 * entry, the total. A write adds its difference to one entry a level, a draw goes down from the top. Sums are of
 * integers, so they are exact at any time and in any order.
 *
 * N = capacity, B = elements per call.
 */

enum { ROW_BITS = 4, ROW = 1 << ROW_BITS, FAN_BITS = 2, FAN = 1 << FAN_BITS, MAX_LEVELS = 16, TOGETHER = 64 };

typedef struct {
    int32_t *leaf;                          /* a row of them fits into a line of the cache */
    int64_t *level[MAX_LEVELS], *num_live; /* num_live: leaves above 0 */
    int64_t count[MAX_LEVELS], capacity;
    int levels;
} Tree;

static int64_t lay_out(Tree *tree, int32_t *leaf, int64_t *sums, int64_t capacity) {
    int64_t used = 1, count = (capacity + ROW - 1) >> ROW_BITS;
    tree->leaf = leaf, tree->num_live = sums, tree->capacity = capacity, tree->levels = 0;
    for (;; count = (count + FAN - 1) >> FAN_BITS) {
        tree->level[tree->levels] = sums + used;
        tree->count[tree->levels++] = count;
        if (count == 1) return used + 1;
        used += (count + FAN - 1) >> FAN_BITS << FAN_BITS; /* whole groups, so that a draw may read all of one */
    }
}

static inline int64_t total_of(const Tree *tree) { return tree->level[tree->levels - 1][0]; }

/* Sum the levels from `from` on; what is behind the last leaf or entry of a group is 0. */
WIDE static void sum_levels(const Tree *tree, int from) {
    for (int64_t i = 0; !from && i < tree->count[0]; i++) {
        uint32_t sum = 0; /* at most 2^31 */
        for (int j = 0; j < ROW; j++) sum += (uint32_t)tree->leaf[i * ROW + j];
        tree->level[0][i] = sum;
    }
    for (int k = from ? from : 1; k < tree->levels; k++) {
        const int64_t *entry = tree->level[k - 1];
        for (int64_t i = 0; i < tree->count[k]; i++, entry += FAN)
            tree->level[k][i] = (entry[0] + entry[1]) + (entry[2] + entry[3]);
    }
}

WIDE static int64_t count_live(const int32_t *leaf, int num) {
    int live = 0;
    for (int i = 0; i < num; i++) live += leaf[i] > 0;
    return live;
}

/* The one of four sums that holds a target, which becomes what is left of it there. Without branches, because
 * a processor overlaps draws whose way it need not guess. */
static inline int64_t within(int64_t a, int64_t b, int64_t c, int64_t *target) {
    int64_t at = *target, is_past_a = at >= a, is_past_b = at >= a + b, is_past_c = at >= a + b + c;
    *target = at - ((a & -is_past_a) + (b & -is_past_b) + (c & -is_past_c));
    return is_past_a + is_past_b + is_past_c;
}

/* The leaves whose intervals of the cumulative sum hold the targets, from 0 to before the total, in their place. Many
 * go down a level together, because the processor then waits for their entries at once. */
WIDE static void find_all(const Tree *tree, int64_t *targets, int64_t num) {
    for (int64_t first = 0; first < num; first += TOGETHER, targets += TOGETHER) {
        int64_t here = num - first < TOGETHER ? num - first : TOGETHER, found[TOGETHER];
        for (int64_t i = 0; i < here; i++) found[i] = 0;
        for (int k = tree->levels - 2; k >= 0; k--) {
            const int64_t *level = tree->level[k];
            for (int64_t i = 0; i < here; i++) {
                const int64_t *entry = level + found[i] * FAN;
                found[i] = found[i] * FAN + within(entry[0], entry[1], entry[2], &targets[i]);
            }
        }
        for (int64_t i = 0; i < here; i++) {
            const int32_t *entry = tree->leaf + found[i] * ROW;
            int64_t a = (entry[0] + entry[1]) + (entry[2] + entry[3]), b = (entry[4] + entry[5]) + (entry[6] + entry[7]);
            int64_t c = (entry[8] + entry[9]) + (entry[10] + entry[11]);
            found[i] = found[i] * FAN + within(a, b, c, &targets[i]);
        }
        for (int64_t i = 0; i < here; i++) {
            const int32_t *entry = tree->leaf + found[i] * FAN;
            targets[i] = found[i] * FAN + within(entry[0], entry[1], entry[2], &targets[i]);
        }
    }
}

/* A walk along the leaves for targets that ascend. */
typedef struct {
    int64_t at, before; /* a leaf, and the sum of those before it */
} Walk;

static inline int64_t find_next(const Tree *tree, Walk *walk, int64_t target) {
    int64_t at = walk->at, before = walk->before;
    while (target >= before + tree->leaf[at]) {
        before += tree->leaf[at++];
        /* Where a group begins it may be passed over whole, and where a group of groups does, that. */
        for (int k = 0; k >= 0;) {
            int shift = ROW_BITS + FAN_BITS * k;
            int64_t group = at >> shift;
            if (group << shift == at && group < tree->count[k] && target >= before + tree->level[k][group]) {
                before += tree->level[k][group];
                at = (group + 1) << shift;
                k += k + 1 < tree->levels;
            } else {
                k--;
            }
        }
    }
    walk->at = at, walk->before = before;
    return at;
}
