/* out [m, n] in float32 = left [m, k] right [k, n] of bfloat16, or added to it. Products are exact and summed in float32,
 * in an order that depends on k alone: an element has the same bits whatever rows and columns stand beside it.
 *
 * A tile of TILE_ROWS x TILE_COLUMNS sums stays in registers. For each pair of k it takes TILE_COLUMNS pairs of the right
 * operand, read from a panel in the second-level cache, and one pair a row of the left one, from the first-level cache.
 */

enum {
    TILE_ROWS = 6,
    TILE_COLUMNS = 64,
    BLOCK_ROWS = 96,      /* a multiple of TILE_ROWS and of 16 */
    BLOCK_COLUMNS = 1024, /* a multiple of TILE_COLUMNS */
    BLOCK_DEPTH = 640,    /* a multiple of 32 */
    MOST_PARTS = 64,
};

typedef struct {
    Operand left, right;
    float *out;
    int64_t stride, m, n, k; /* stride of the rows of `out`, in elements */
    int adds, has_failed;
} Product;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Write the sums of one tile; those past `rows` and `columns` are left out. */
UNITS static inline void multiply_tile(const uint32_t *left, const uint32_t *right, int64_t pairs, float *out,
                                       int64_t stride, int64_t rows, int64_t columns, int adds) {
    for (int r = 0; r < TILE_ROWS && r < rows; r++) /* the sums are ready when these have come from memory */
        for (int c = 0; c < 4 && 16 * c < columns; c++) __builtin_prefetch(out + r * stride + 16 * c, 1);
    __m512 sum[TILE_ROWS][4];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int c = 0; c < 4; c++) sum[r][c] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++, left += TILE_ROWS, right += TILE_COLUMNS) {
        __m512bh of_right[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) of_right[c] = (__m512bh)_mm512_loadu_si512(right + 16 * c);
#pragma GCC unroll 6
        for (int r = 0; r < TILE_ROWS; r++) {
            __m512bh of_left = (__m512bh)_mm512_set1_epi32((int)left[r]);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], of_left, of_right[c]);
        }
    }
    for (int r = 0; r < TILE_ROWS && r < rows; r++) {
        for (int c = 0; c < 4; c++) {
            float *to = out + r * stride + 16 * c;
            __mmask16 mask = (__mmask16)first_bits(columns - 16 * c);
            __m512 value = sum[r][c];
            if (adds) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
            _mm512_mask_storeu_ps(to, mask, value);
        }
    }
}

/* Write pairs [tiles, depth / 2, TILE_ROWS] of rows of the left operand, by way of [depth / 2, BLOCK_ROWS]. */
UNITS static void pack_left(uint32_t *to, uint32_t *by_way, Operand from, int64_t depth, int64_t rows) {
    int64_t pairs = (depth + 1) / 2;
    pack_pairs(by_way, BLOCK_ROWS, from, depth, rows);
    for (int64_t first = 0; first < rows; first += TILE_ROWS)
        for (int64_t p = 0; p < pairs; p++, to += TILE_ROWS)
            memcpy(to, by_way + p * BLOCK_ROWS + first, TILE_ROWS * sizeof *to);
}

/* Multiply on this thread, with room for one block of each operand. */
UNITS static void multiply_with(const Product *product, uint32_t *left, uint32_t *by_way, uint32_t *right) {
    int64_t m = product->m, n = product->n, k = product->k, stride = product->stride;
    int64_t num_blocks = (k + BLOCK_DEPTH - 1) / BLOCK_DEPTH;
    int64_t most = (k / num_blocks + 32) / 32 * 32; /* blocks of nearly one depth */
    if (most > BLOCK_DEPTH) most = BLOCK_DEPTH;
    for (int64_t j = 0; j < n; j += BLOCK_COLUMNS) {
        int64_t columns = least(BLOCK_COLUMNS, n - j);
        for (int64_t d = 0; d < k; d += most) {
            int64_t depth = least(most, k - d), pairs = (depth + 1) / 2;
            for (int64_t c = 0; c < columns; c += TILE_COLUMNS)
                pack_pairs(right + c * pairs, TILE_COLUMNS, moved(product->right, d, j + c), depth, least(TILE_COLUMNS, columns - c));
            for (int64_t i = 0; i < m; i += BLOCK_ROWS) {
                int64_t rows = least(BLOCK_ROWS, m - i);
                pack_left(left, by_way, moved(product->left, d, i), depth, rows);
                for (int64_t c = 0; c < columns; c += TILE_COLUMNS)
                    for (int64_t r = 0; r < rows; r += TILE_ROWS)
                        multiply_tile(left + r * pairs, right + c * pairs, pairs, product->out + (i + r) * stride + j + c,
                                      stride, rows - r, columns - c, product->adds || d > 0);
            }
        }
    }
}

static void multiply_part(Product *product) {
    if (product->k == 0) {
        for (int64_t i = 0; i < product->m && !product->adds; i++)
            memset(product->out + i * product->stride, 0, sizeof(float) * (size_t)product->n);
        return;
    }
    size_t pairs = BLOCK_DEPTH / 2, room = pairs * (2 * BLOCK_ROWS + BLOCK_COLUMNS);
    uint32_t *memory = aligned_alloc(64, room * sizeof *memory);
    product->has_failed = memory == NULL;
    if (memory) multiply_with(product, memory, memory + pairs * BLOCK_ROWS, memory + 2 * pairs * BLOCK_ROWS);
    free(memory);
}

/* Parts of a product that threads take one after another. */
typedef struct {
    Product part[MOST_PARTS];
    int64_t num;
    atomic_llong next;
} Parts;

static void multiply_parts(void *given) {
    Parts *parts = given;
    for (;;) {
        int64_t i = atomic_fetch_add(&parts->next, 1);
        if (i >= parts->num) return;
        multiply_part(&parts->part[i]);
    }
}

/* Threads of the OpenMP library that PyTorch has loaded, if there is one. They wait for work in a loop that keeps their
 * processors busy, so threads of our own would have to share those. */
typedef void (*Parallel)(void (*work)(void *), void *given, unsigned threads, unsigned flags);
static Parallel pool;

static void find_pool(void) { pool = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel"); }

/* Multiply on up to `threads` threads, each of which takes rows or columns of its own; return whether there was memory. */
static int multiply(Product whole, int64_t threads) {
    Parts parts = {.num = 0};
    int splits_columns = whole.n > 4 * whole.m; /* what is not split is laid out by every thread */
    int64_t size = splits_columns ? whole.n : whole.m, grain = splits_columns ? TILE_COLUMNS : TILE_ROWS;
    double work = (double)whole.m * (double)whole.n * (double)whole.k;
    if (work < 1e6 || !pool || threads < 1) threads = 1;
    threads = least(threads, MOST_PARTS);
    int64_t share = ((size + threads - 1) / threads + grain - 1) / grain * grain;
    for (int64_t first = 0; first < size; first += share) {
        int64_t taken = least(share, size - first);
        Product *part = &parts.part[parts.num++];
        *part = whole;
        if (splits_columns) {
            part->right = moved(whole.right, 0, first);
            part->out += first;
            part->n = taken;
        } else {
            part->left = moved(whole.left, 0, first);
            part->out += first * whole.stride;
            part->m = taken;
        }
    }
    if (parts.num > 1)
        pool(multiply_parts, &parts, (unsigned)parts.num, 0);
    else
        multiply_parts(&parts);
    int is_done = 1;
    for (int64_t i = 0; i < parts.num; i++) is_done &= !parts.part[i].has_failed;
    return is_done;
}
