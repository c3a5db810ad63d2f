/* Draws in proportion to the weights, as `draw_targets` and `select` of `arithmetic` make them. */

enum { IID, STRATIFIED, SYSTEMATIC };

typedef struct {
    int64_t *idx, *q, *total; /* [B], [B], [] */
    float *prob;              /* [B] */
} Drawn;

typedef struct {
    uint64_t start;
    int64_t size, *status;
} State;

/* The live prefix, from which an empty tree draws evenly. */
static int64_t prefix_of(const Tree *tree, int64_t size) {
    return size < 0 ? 0 : size < tree->capacity ? size : tree->capacity;
}

WIDE static void shares(const int64_t *restrict q, float *restrict prob, int64_t num, double total) {
    for (int64_t i = 0; i < num; i++) prob[i] = (float)((double)q[i] / total);
}

static void finish(const Tree *tree, const Drawn *drawn, int64_t num, int64_t size) {
    int64_t total = *drawn->total = total_of(tree);
    for (int64_t i = 0; i < num; i++) drawn->q[i] = drawn->idx[i] < 0 ? 0 : tree->leaf[drawn->idx[i]];
    if (total > 0) {
        shares(drawn->q, drawn->prob, num, (double)total);
        return;
    }
    float even = (float)(1.0 / (double)(size > 1 ? size : 1));
    for (int64_t i = 0; i < num; i++) drawn->prob[i] = drawn->idx[i] < 0 ? 0.0f : even;
}

static void draw(const Tree *tree, int mode, int64_t num, const State *state, int64_t *idx) {
    int64_t total = total_of(tree), whole = total ? total : prefix_of(tree, state->size);
    state->status[EMPTY] += total == 0;
    if (whole == 0) {
        for (int64_t i = 0; i < num; i++) idx[i] = -1;
        return;
    }
    if (mode == IID) {
        for (int64_t i = 0; i < num; i++) idx[i] = below(random_bits(state->start, i), whole);
    } else if (num > 0) {
        /* floor((o + i whole) / B) for i = 0, 1, ..., without a division for each. */
        int64_t quotient = whole / num, remainder = whole % num, carried, edge, rest;
        int64_t offset = mode == SYSTEMATIC ? below(random_bits(state->start, 0), whole) : 0;
        edge = offset / num, rest = offset % num;
        for (int64_t i = 0; i < num; i++) {
            int64_t here = edge;
            carried = rest + remainder >= num;
            rest += remainder - (carried ? num : 0);
            edge += quotient + carried;
            idx[i] = mode == SYSTEMATIC ? here : here + below(random_bits(state->start, i), edge - here);
        }
    }
    if (total == 0) return; /* every leaf of the prefix counts 1 */
    if (mode != IID && num >= tree->capacity / 8) {
        Walk walk = {0, 0};
        for (int64_t i = 0; i < num; i++) idx[i] = find_next(tree, &walk, idx[i]);
    } else {
        find_all(tree, idx, num);
    }
}

static void sample(const Tree *tree, int mode, int64_t num, const State *state, const Drawn *drawn) {
    draw(tree, mode, num, state, drawn->idx);
    if (mode == SYSTEMATIC) {
        int64_t repeats = 0;
        for (int64_t i = 1; i < num; i++) repeats += drawn->idx[i] == drawn->idx[i - 1] && drawn->idx[i] >= 0;
        state->status[REPEATS] += repeats;
    }
    finish(tree, drawn, num, state->size);
}

/* The first B distinct of 1.5 B + 32 iid draws; returns whether there was memory for them. */
static int first_distinct(const Tree *tree, int64_t num, const State *state, const Drawn *drawn) {
    int64_t candidates = num + num / 2 + 32, found = 0;
    uint64_t room = 64;
    while ((int64_t)room < 2 * candidates) room *= 2;
    int64_t *drawn_idx = malloc(candidates * sizeof *drawn_idx), *seen = malloc(room * sizeof *seen);
    if (drawn_idx && seen) {
        memset(seen, -1, room * sizeof *seen);
        draw(tree, IID, candidates, state, drawn_idx);
        for (int64_t i = 0; i < candidates && found < num; i++) {
            if (drawn_idx[i] < 0) continue;
            uint64_t slot = ((uint64_t)drawn_idx[i] * GAMMA) & (room - 1);
            while (seen[slot] >= 0 && seen[slot] != drawn_idx[i]) slot = (slot + 1) & (room - 1);
            if (seen[slot] < 0) drawn->idx[found++] = seen[slot] = drawn_idx[i];
        }
        state->status[SHORT] += found < num;
        while (found < num) drawn->idx[found++] = -1;
        finish(tree, drawn, num, state->size);
    }
    int is_done = drawn_idx && seen;
    free(drawn_idx), free(seen);
    return is_done;
}
