/* Averages of a score map's probabilities over patches, and the k largest of each; and two small
 * loops over stored maps.
 *
 * The same as the NumPy functions of sampling.py and merging.py, which stay the reference (tests
 * compare the two) and do the work where this module was not compiled. Only for speed: a patch shows
 * a few cells with a few classes each, and NumPy pays for whole arrays of all classes at every step.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Shares below this are rounding: as _NOTHING in sampling.py. */
#define NOTHING 1e-9

/* One view of a map, as it is stored or wider: [rows, columns, k]. */
typedef struct {
    const void *scores, *classes, *rest; /* rest: [rows, columns] */
    Py_ssize_t rows, columns, k, first; /* first: the view's first cell */
    int half_scores, half_rest;         /* float16, not float32 */
    int short_classes;                  /* 16 bits, not 32 */
} Map;

/* A class that occurs. */
typedef struct {
    int32_t id;
    int32_t stamp; /* the last patch that had it */
    float sum;     /* of the patch at hand; 0 between patches */
} Column;

/* What is known of the cells so far: softmax and columns of those met, and the columns themselves. */
typedef struct {
    Map map;
    float *probs;     /* [cells, k] */
    int32_t *indices; /* [cells, k], into `columns`; the first of a cell is -1 until it is met */
    Column *columns;  /* [width] */
    int32_t width;
    int32_t *slots; /* hash table of columns, -1 where empty; at most half full */
    uint32_t mask;
    int32_t *touched; /* columns of the patch at hand, and one place more */
    uint64_t *best;   /* [k], its largest sums */
    int32_t stamp;
} Table;

/* Where the results of a patch go. */
typedef struct {
    int32_t *classes; /* [N + 1, k] */
    float *probs;     /* [N + 1, k] */
    float *rest;      /* [N + 1] */
    float *weight;    /* [N] */
    Py_ssize_t k;
} Out;

/* Patches along one axis of the map, as Span in sampling.py; in cells. */
typedef struct {
    double start, length, low, high;
    Py_ssize_t patches, cells;
    Py_ssize_t *first, *count; /* [patches], the cells that each patch shows */
    double *weights;           /* [patches, cells], from `first` on; sums to 1, or 0 outside */
    double *share;             /* [patches] */
    double *total;             /* [cells], how much each counts in all patches together */
    Py_ssize_t begin, end;     /* the cells that any patch shows */
} Axis;

/* ---- memory: one block a call, the last one kept, for fresh pages cost more than the work ---- */

#define KEPT (1 << 20) /* bytes, at most */

static void *spare; /* guarded by the GIL */
static size_t spare_size;

typedef struct {
    char *start;
    size_t size, used;
} Block;

/* Room for n items; before the block is there (start is NULL) it only counts. */
static void *room(Block *block, size_t n, size_t item)
{
    char *place = block->start ? block->start + block->used : NULL;
    size_t size = n > (SIZE_MAX / 4) / item ? SIZE_MAX / 4 : (n * item + 15) & ~(size_t)15;
    block->used = block->used > SIZE_MAX / 4 ? block->used : block->used + size;
    return place;
}

/* With the GIL. */
static int take(Block *block)
{
    if (block->used >= SIZE_MAX / 4)
        return -1;
    if (spare && spare_size >= block->used) {
        block->start = spare;
        block->size = spare_size;
        spare = NULL;
    } else {
        block->size = block->used;
        block->start = malloc(block->size);
    }
    block->used = 0;
    return block->start ? 0 : -1;
}

/* With the GIL. */
static void give(Block *block)
{
    if (block->size <= KEPT && (!spare || spare_size < block->size)) {
        free(spare);
        spare = block->start;
        spare_size = block->size;
    } else
        free(block->start);
}

/* ---- numbers ---- */

static inline float from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u;
    uint32_t fraction = half & 0x3FFu, bits;
    float value, small = (float)(int32_t)fraction * 0x1p-24f;
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    memcpy(&value, &bits, sizeof value);
    return exponent ? value : sign ? -small : small;
}

static inline float number(const void *values, int half, Py_ssize_t i)
{
    return half ? from_half(((const uint16_t *)values)[i]) : ((const float *)values)[i];
}

/* exp(x) of x <= 0, to float rounding; 0 below -86. Compilers make it a vector loop, unlike expf. */
static inline float decay(float x)
{
#if FLT_EVAL_METHOD == 0
    float y = x > -86.0f ? x : -86.0f, n = y * 1.44269504f + 0x1.8p23f, r, e;
    uint32_t power, bits;
    memcpy(&power, &n, sizeof power); /* the lowest bits hold n, rounded */
    n -= 0x1.8p23f;
    r = y - n * 0x1.62ep-1f;  /* ln 2, of so few bits that the product is exact, */
    r -= n * 0x1.0bfbe8p-15f; /* and the rest of it; |r| <= ln 2 / 2: Taylor's series will do */
    e = 1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f));
    e = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * e))));
    memcpy(&bits, &e, sizeof bits);
    bits += power << 23;
    memcpy(&e, &bits, sizeof e);
    return x > -86.0f ? e : x == x ? 0.0f : x;
#else
    return expf(x);
#endif
}

/* ---- the table ---- */

static int too_large(const Map *map)
{
    return map->k > INT32_MAX / 8 / (map->rows * map->columns);
}

/* Lays the table out in the block. */
static void lay_table(Block *block, Table *table, const Map *map, Py_ssize_t kept)
{
    size_t entries = (size_t)(map->rows * map->columns * map->k), slots = 256;
    while (slots < 2 * entries)
        slots *= 2;
    table->map = *map;
    table->best = room(block, (size_t)kept, sizeof *table->best);
    table->columns = room(block, entries, sizeof *table->columns);
    table->touched = room(block, entries + 1, sizeof *table->touched);
    table->probs = room(block, entries, sizeof *table->probs);
    table->indices = room(block, entries, sizeof *table->indices);
    table->slots = room(block, slots, sizeof *table->slots);
}

/* As few slots as will do are used, for most maps hold few classes. */
static void empty_slots(Table *table, uint32_t slots)
{
    table->mask = slots - 1;
    memset(table->slots, -1, sizeof *table->slots * slots);
}

static uint32_t free_slot(const Table *table, int32_t id, int32_t *column)
{
    uint32_t slot = (((uint32_t)id * 2654435769u) >> 7) & table->mask;
    while ((*column = table->slots[slot]) >= 0 && table->columns[*column].id != id)
        slot = (slot + 1) & table->mask;
    return slot;
}

static int32_t column_of(Table *table, int32_t id)
{
    int32_t column, other, i;
    uint32_t slot = free_slot(table, id, &column);
    if (column >= 0)
        return column;
    column = table->width++;
    table->slots[slot] = column;
    table->columns[column] = (Column){id, -1, 0};
    if (2 * (uint32_t)table->width > table->mask + 1) {
        empty_slots(table, 2 * (table->mask + 1));
        for (i = 0; i < table->width; i++)
            table->slots[free_slot(table, table->columns[i].id, &other)] = i;
    }
    return column;
}

/* Softmax of a cell's scores and rest, stable for logits of any size; -inf has probability 0. */
static void meet(Table *table, Py_ssize_t cell)
{
    const Map *map = &table->map;
    Py_ssize_t k = map->k, start = (map->first + cell) * k, i;
    float *probs = table->probs + cell * k;
    int32_t *indices = table->indices + cell * k;
    float rest = number(map->rest, map->half_rest, map->first + cell), top = rest, total;
    if (map->half_scores)
        for (i = 0; i < k; i++)
            probs[i] = from_half(((const uint16_t *)map->scores)[start + i]);
    else
        memcpy(probs, (const float *)map->scores + start, sizeof *probs * (size_t)k);
    for (i = 0; i < k; i++)
        top = probs[i] > top ? probs[i] : top;
    for (i = 0; i < k; i++)
        probs[i] = decay(probs[i] - top);
    total = decay(rest - top);
    for (i = 0; i < k; i++)
        total += probs[i];
    for (i = 0; i < k; i++)
        probs[i] /= total;
    if (map->short_classes)
        for (i = 0; i < k; i++)
            indices[i] = column_of(table, ((const uint16_t *)map->classes)[start + i]);
    else
        for (i = 0; i < k; i++)
            indices[i] = column_of(table, ((const int32_t *)map->classes)[start + i]);
}

static void begin_table(Table *table)
{
    table->width = 0;
    table->stamp = 0;
    empty_slots(table, 256);
}

/* Adds a cell to the patch at hand; returns how many columns the patch then has. */
static inline int32_t add(Table *table, int32_t count, Py_ssize_t cell, double weight)
{
    Py_ssize_t k = table->map.k, i;
    const int32_t *indices = table->indices + cell * k;
    const float *probs = table->probs + cell * k;
    int32_t *touched = table->touched, stamp = table->stamp;
    Column *columns = table->columns;
    float scale = (float)weight;
    for (i = 0; i < k; i++) { /* no branch: none could be predicted */
        Column *column = columns + indices[i];
        touched[count] = indices[i];
        count += column->stamp != stamp;
        column->stamp = stamp;
        column->sum += scale * probs[i];
    }
    return count;
}

/* The largest sums of the patch at hand; among equals, the smaller class id first. Ends the patch.
 *
 * A sum and its id make one integer in which larger is earlier: positive floats are ordered as their
 * bits are. Sorted by insertion without a branch but the one that most candidates fail.
 */
static void finish(Table *table, int32_t count, const Out *out, Py_ssize_t row)
{
    int32_t *classes = out->classes + row * out->k, n;
    float *probs = out->probs + row * out->k;
    uint64_t *best = table->best;
    Py_ssize_t k = out->k, i;
    double mass = 0;
    memset(best, 0, sizeof *best * (size_t)k);
    for (n = 0; n < count; n++) {
        Column *column = table->columns + table->touched[n];
        uint64_t entry;
        uint32_t bits;
        memcpy(&bits, &column->sum, sizeof bits);
        column->sum = 0;
        entry = (uint64_t)bits << 32 | (UINT32_MAX - (uint32_t)column->id);
        if (entry <= best[k - 1])
            continue;
        for (i = k - 1; i > 0; i--) {
            uint64_t other = best[i - 1] < entry ? best[i - 1] : entry;
            best[i] = best[i] > other ? best[i] : other;
        }
        best[0] = best[0] > entry ? best[0] : entry;
    }
    for (i = 0; i < k; i++) {
        uint32_t bits = (uint32_t)(best[i] >> 32);
        memcpy(probs + i, &bits, sizeof bits);
        classes[i] = bits ? (int32_t)(UINT32_MAX - (uint32_t)best[i]) : 0;
        mass += probs[i];
    }
    out->rest[row] = mass < 1 ? (float)(1 - mass) : 0;
    table->stamp++;
}

/* ---- upright paths: exact weights, a product of one for rows and one for columns ---- */

static double hat(double x)
{
    x = x < -1 ? -1 : x > 1 ? 1 : x;
    return x - 0.5 * x * fabs(x); /* integral of 1 - |x|, up to a constant */
}

static double step(double x)
{
    return x < 0 ? 0 : x > 1 ? 1 : x;
}

static double within(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

static void lay_axis(Block *block, Axis *axis)
{
    size_t n = (size_t)axis->patches, cells = (size_t)axis->cells;
    axis->weights = room(block, n > SIZE_MAX / cells ? SIZE_MAX : n * cells, sizeof(double));
    axis->share = room(block, n, sizeof(double));
    axis->first = room(block, n, sizeof(Py_ssize_t));
    axis->count = room(block, n, sizeof(Py_ssize_t));
    axis->total = room(block, cells, sizeof(double));
}

static void weigh(Axis *axis, int nearest)
{
    Py_ssize_t n = axis->patches, cells = axis->cells, i, j;
    double shares = 0;
    axis->begin = cells;
    axis->end = 0;
    memset(axis->weights, 0, sizeof(double) * (size_t)(n * cells));
    memset(axis->total, 0, sizeof(double) * (size_t)cells);
    for (i = 0; i < n; i++) {
        double *weights = axis->weights + i * cells, sum = 0;
        double p = within(axis->start + i * (axis->length / n), axis->low, axis->high);
        double q = within(axis->start + (i + 1) * (axis->length / n), axis->low, axis->high);
        double from = p < q ? p : q, to = p < q ? q : p;
        /* A kernel reaches half a cell beyond its own. Beyond its border, a map goes on as its
         * outermost cell: one cell more on either side counts to the border. */
        Py_ssize_t begin = (Py_ssize_t)floor(from - 0.5), end = (Py_ssize_t)ceil(to + 0.5);
        begin = begin < 0 ? 0 : begin;
        end = end > cells ? cells : end;
        axis->first[i] = begin;
        axis->count[i] = end > begin ? end - begin : 0;
        for (j = nearest ? begin : begin - 1; j < (nearest ? end : end + 1); j++) {
            Py_ssize_t cell = j < begin ? begin : j >= end ? end - 1 : j;
            double weight = nearest ? step(to - j) - step(from - j)
                                    : hat(to - j - 0.5) - hat(from - j - 0.5);
            /* Inside the map a kernel beyond the range does not reach the patch. */
            if (axis->count[i]) {
                weights[cell - begin] += weight;
                sum += weight;
            }
        }
        axis->share[i] = sum * n / fabs(axis->length);
        if (!(axis->share[i] >= NOTHING)) {
            axis->share[i] = 0;
            axis->count[i] = 0;
            continue;
        }
        for (j = 0; j < axis->count[i]; j++)
            weights[j] /= sum;
        axis->begin = begin < axis->begin ? begin : axis->begin;
        axis->end = end > axis->end ? end : axis->end;
        shares += axis->share[i];
    }
    for (i = 0; i < n; i++)
        for (j = 0; j < axis->count[i]; j++)
            axis->total[axis->first[i] + j] +=
                axis->share[i] / shares * axis->weights[i * cells + j];
}

/* The patches along the map's rows (y) and columns (x), as `spans` in sampling.py. */
static void span(const Map *map, int view, const double *matrix, const double *box,
                 const double *extent, const double *canvas, const Py_ssize_t *grid, Axis *y,
                 Axis *x, int *transposed)
{
    double step_x, step_y, c = matrix[2], m, n;
    double x0 = extent[0], y0 = extent[1], x1 = extent[2], y1 = extent[3];
    double left = box[0] > x0 ? box[0] : x0, top = box[1] > y0 ? box[1] : y0;
    double right = box[2] < x1 ? box[2] : x1, bottom = box[3] < y1 ? box[3] : y1, other;
    *transposed = matrix[0] == 0 && matrix[4] == 0;
    step_x = *transposed ? matrix[1] * canvas[0] : matrix[0] * canvas[1];
    step_y = *transposed ? matrix[3] * canvas[1] : matrix[4] * canvas[0];
    x->patches = grid[!*transposed];
    y->patches = grid[*transposed];
    if (view == 1) { /* of the mirrored picture */
        c = 1 - c, step_x = -step_x;
        other = x0, x0 = 1 - x1, x1 = 1 - other;
        other = left, left = 1 - right, right = 1 - other;
    }
    m = map->rows / (y1 - y0), n = map->columns / (x1 - x0);
    y->start = (matrix[5] - y0) * m, x->start = (c - x0) * n;
    y->length = step_y * m, x->length = step_x * n;
    y->cells = map->rows, x->cells = map->columns;
    /* A box beyond the extent shows nothing: from the last point to the last. */
    y->low = (top - y0) * m < map->rows ? (top - y0) * m : map->rows;
    x->low = (left - x0) * n < map->columns ? (left - x0) * n : map->columns;
    y->high = (bottom - y0) * m > y->low ? (bottom - y0) * m : y->low;
    x->high = (right - x0) * n > x->low ? (right - x0) * n : x->low;
}

static void upright(Table *table, const Axis *y, const Axis *x, int transposed, const Out *out)
{
    Py_ssize_t i, j, r, c, columns = x->cells;
    int32_t count;
    for (r = y->begin; r < y->end; r++)
        for (c = x->begin; c < x->end; c++)
            meet(table, r * columns + c);
    for (i = 0; i < y->patches; i++) {
        const double *wy = y->weights + i * y->cells;
        for (j = 0; j < x->patches; j++) {
            const double *wx = x->weights + j * columns;
            Py_ssize_t row = transposed ? j * y->patches + i : i * x->patches + j;
            count = 0;
            for (r = 0; r < y->count[i]; r++)
                for (c = 0; c < x->count[j]; c++)
                    if (wy[r] * wx[c] > 0)
                        count = add(table, count, (y->first[i] + r) * columns + x->first[j] + c,
                                    wy[r] * wx[c]);
            finish(table, count, out, row);
            out->weight[row] = (float)(y->share[i] * x->share[j]);
        }
    }
    count = 0;
    for (r = y->begin; r < y->end; r++)
        for (c = x->begin; c < x->end; c++)
            if (y->total[r] * x->total[c] > 0)
                count = add(table, count, r * columns + c, y->total[r] * x->total[c]);
    finish(table, count, out, y->patches * x->patches);
}

/* ---- other paths: weights of single cells, as runs of entries, one run a patch ---- */

static void scattered(Table *table, const int64_t *cells, const float *weights,
                      const int64_t *offsets, const double *share, Py_ssize_t patches,
                      Py_ssize_t entries, double *total, const Out *out)
{
    Py_ssize_t map_cells = table->map.rows * table->map.columns, i, e;
    double sum = 0;
    int32_t count;
    memset(total, 0, sizeof *total * (size_t)map_cells);
    memset(table->indices, -1, sizeof *table->indices * (size_t)(map_cells * table->map.k));
    for (i = 0; i < patches; i++)
        sum += share[i];
    for (i = 0; i < patches; i++) {
        Py_ssize_t end = i + 1 < patches ? offsets[i + 1] : entries;
        count = 0;
        for (e = offsets[i]; e < end; e++) {
            if (table->indices[cells[e] * table->map.k] < 0)
                meet(table, cells[e]);
            count = add(table, count, cells[e], weights[e]);
            total[cells[e]] += share[i] / sum * weights[e];
        }
        finish(table, count, out, i);
        out->weight[i] = (float)share[i];
    }
    count = 0;
    for (i = 0; i < map_cells; i++)
        if (total[i] > 0)
            count = add(table, count, i, total[i]);
    finish(table, count, out, patches);
}

/* ---- Python ---- */

typedef struct {
    Py_buffer scores, classes, rest, out_classes, out_probs, out_rest, out_weight;
} Buffers;

static void release(Buffers *buffers)
{
    Py_buffer *all = (Py_buffer *)buffers;
    size_t i;
    for (i = 0; i < sizeof *buffers / sizeof *all; i++)
        PyBuffer_Release(all + i);
}

/* What "y*" gives has its item's size, though not its format. */
static int items(const Py_buffer *buffer, int small, int large)
{
    return buffer->itemsize == small || buffer->itemsize == large;
}

/* Map and results from the buffers; their sizes must agree, or nothing here could be trusted. */
static int understand(const Buffers *b, Py_ssize_t k, Py_ssize_t view, Py_ssize_t rows,
                      Py_ssize_t columns, Py_ssize_t patches, Map *map, Out *out)
{
    Py_ssize_t entries, cells, views = 0;
    int fits = items(&b->scores, 2, 4) && items(&b->classes, 2, 4) && items(&b->rest, 2, 4);
    fits = fits && rows > 0 && columns > 0 && patches > 0 && k > 0 && view >= 0;
    fits = fits && rows <= b->rest.len && columns <= b->rest.len / rows;
    if (fits) {
        cells = rows * columns;
        entries = b->scores.len / b->scores.itemsize;
        views = b->rest.len / b->rest.itemsize / cells;
        fits = views > view && b->rest.len == views * cells * b->rest.itemsize;
        fits = fits && entries > 0 && entries % (views * cells) == 0;
        fits = fits && entries == b->classes.len / b->classes.itemsize;
        fits = fits && patches < b->out_rest.len && k <= b->out_classes.len;
        fits = fits && b->out_classes.len / 4 / k == patches + 1 &&
               b->out_classes.len == 4 * k * (patches + 1);
        fits = fits && b->out_probs.len == b->out_classes.len;
        fits = fits && b->out_rest.len == 4 * (patches + 1) && b->out_weight.len == 4 * patches;
    }
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit together");
        return -1;
    }
    *map = (Map){b->scores.buf,   b->classes.buf, b->rest.buf,
                 rows,            columns,        entries / (views * cells),
                 view * cells,    b->scores.itemsize == 2,
                 b->rest.itemsize == 2, b->classes.itemsize == 2};
    *out = (Out){b->out_classes.buf, b->out_probs.buf, b->out_rest.buf, b->out_weight.buf, k};
    if (too_large(map)) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static PyObject *merge_upright(PyObject *self, PyObject *args)
{
    Buffers b;
    Axis y = {0}, x = {0};
    Map map;
    Out out;
    Table table = {0};
    Block block = {0};
    Py_ssize_t k, view, rows, columns, grid[2], patches;
    double m[9], box[4], extent[4], canvas[2];
    int transposed, nearest, pass, failed = 1;
    if (!PyArg_ParseTuple(args, "y*y*y*nnnw*w*w*w*n(ddddddddd)(dddd)(dddd)(dd)(nn)p", &b.scores,
                          &b.classes, &b.rest, &view, &rows, &columns, &b.out_classes,
                          &b.out_probs, &b.out_rest, &b.out_weight, &k, m, m + 1, m + 2, m + 3,
                          m + 4, m + 5, m + 6, m + 7, m + 8, box, box + 1, box + 2, box + 3,
                          extent, extent + 1, extent + 2, extent + 3, canvas, canvas + 1, grid,
                          grid + 1, &nearest))
        return NULL;
    patches = grid[0] > 0 && grid[1] > 0 && grid[0] <= b.out_rest.len / grid[1] ? grid[0] * grid[1]
                                                                                : 0;
    if (understand(&b, k, view, rows, columns, patches, &map, &out) == 0) {
        span(&map, (int)view, m, box, extent, canvas, grid, &y, &x, &transposed);
        for (pass = 0; pass < 2; pass++) { /* to count the room, and to lay things out in it */
            lay_axis(&block, &y);
            lay_axis(&block, &x);
            lay_table(&block, &table, &map, k);
            if (pass == 0 && (failed = take(&block)))
                break;
        }
        if (failed)
            PyErr_NoMemory();
        else {
            Py_BEGIN_ALLOW_THREADS
            begin_table(&table);
            weigh(&y, nearest);
            weigh(&x, nearest);
            upright(&table, &y, &x, transposed, &out);
            Py_END_ALLOW_THREADS
            give(&block);
        }
    }
    release(&b);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *merge_scattered(PyObject *self, PyObject *args)
{
    Buffers b;
    Py_buffer cells, weights, offsets, share;
    Map map;
    Out out;
    Table table = {0};
    Block block = {0};
    double *total = NULL;
    Py_ssize_t k, view, rows, columns, i, entries, patches;
    int fits, pass, failed = 1;
    if (!PyArg_ParseTuple(args, "y*y*y*nnnw*w*w*w*ny*y*y*y*", &b.scores, &b.classes, &b.rest,
                          &view, &rows, &columns, &b.out_classes, &b.out_probs, &b.out_rest,
                          &b.out_weight, &k, &cells, &weights, &offsets, &share))
        return NULL;
    entries = cells.len / 8, patches = share.len / 8;
    fits = weights.len == 4 * entries && offsets.len == share.len;
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "entries that do not fit the map");
    else if (understand(&b, k, view, rows, columns, patches, &map, &out) == 0) {
        for (i = 0; fits && i < entries; i++)
            fits = ((int64_t *)cells.buf)[i] >= 0 && ((int64_t *)cells.buf)[i] < rows * columns;
        for (i = 0; fits && i < patches; i++) {
            int64_t from = ((int64_t *)offsets.buf)[i];
            fits = from >= (i ? ((int64_t *)offsets.buf)[i - 1] : 0) && from <= entries;
        }
        for (pass = 0; fits && pass < 2; pass++) {
            lay_table(&block, &table, &map, k);
            total = room(&block, (size_t)(rows * columns), sizeof *total);
            if (pass == 0 && (failed = take(&block)))
                break;
        }
        if (!fits)
            PyErr_SetString(PyExc_ValueError, "entries that do not fit the map");
        else if (failed)
            PyErr_NoMemory();
        else {
            Py_BEGIN_ALLOW_THREADS
            begin_table(&table);
            scattered(&table, cells.buf, weights.buf, offsets.buf, share.buf, patches, entries,
                      total, &out);
            Py_END_ALLOW_THREADS
            give(&block);
        }
    }
    PyBuffer_Release(&cells), PyBuffer_Release(&weights);
    PyBuffer_Release(&offsets), PyBuffer_Release(&share);
    release(&b);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static int halves_finite(const Py_buffer *buffer)
{
    const uint16_t *halves = buffer->buf;
    Py_ssize_t count = buffer->len / 2, i;
    uint16_t infinite = 0;
    for (i = 0; i < count; i++)
        infinite |= (halves[i] & 0x7C00) == 0x7C00;
    return !infinite;
}

/* Whether each cell has a finite logit, and none NaN or +inf. */
static PyObject *merge_usable(PyObject *self, PyObject *args)
{
    Py_buffer scores, rest;
    Py_ssize_t cells, k, i, j;
    int good = 1, fits;
    if (!PyArg_ParseTuple(args, "y*y*n", &scores, &rest, &k))
        return NULL;
    fits = k > 0 && items(&scores, 2, 4) && items(&rest, 2, 4);
    cells = fits ? rest.len / rest.itemsize : 0;
    fits = fits && scores.len / scores.itemsize / k == cells &&
           scores.len == cells * k * scores.itemsize;
    if (fits && scores.itemsize == 2 && rest.itemsize == 2 && halves_finite(&scores) &&
        halves_finite(&rest))
        cells = 0; /* nothing is left to look for */
    for (i = 0; fits && good && i < cells; i++) {
        float other = number(rest.buf, rest.itemsize == 2, i);
        int some = isfinite(other);
        good = some || other < 0; /* -inf is no mass; of NaN, no comparison holds */
        for (j = 0; j < k; j++) {
            float value = number(scores.buf, scores.itemsize == 2, i * k + j);
            some |= isfinite(value);
            good &= isfinite(value) || value < 0;
        }
        good &= some;
    }
    PyBuffer_Release(&scores), PyBuffer_Release(&rest);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit together");
        return NULL;
    }
    return PyBool_FromLong(good);
}

/* Items of `width` bytes from all their first bytes, then all their second bytes and so on. */
static PyObject *merge_unshuffle(PyObject *self, PyObject *args)
{
    Py_buffer from, to;
    Py_ssize_t width, count, i, j;
    if (!PyArg_ParseTuple(args, "y*w*n", &from, &to, &width))
        return NULL;
    if (width > 0 && from.len == to.len && from.len % width == 0) {
        const unsigned char *source = from.buf;
        unsigned char *target = to.buf;
        count = from.len / width;
        if (width == 2)
            for (i = 0; i < count; i++) {
                target[2 * i] = source[i];
                target[2 * i + 1] = source[count + i];
            }
        else
            for (j = 0; j < width; j++)
                for (i = 0; i < count; i++)
                    target[i * width + j] = source[j * count + i];
    } else
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit together");
    PyBuffer_Release(&from), PyBuffer_Release(&to);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"upright", merge_upright, METH_VARARGS,
     "upright(scores, classes, rest, view, rows, columns, out_classes, out_probs, out_rest, "
     "out_weight, k, matrix, box, extent, canvas, grid, nearest)\n\nExact averages where the picture's path is upright."},
    {"scattered", merge_scattered, METH_VARARGS,
     "scattered(scores, classes, rest, view, rows, columns, out_classes, out_probs, out_rest, "
     "out_weight, k, cells, weights, offsets, share)\n\nAverages with given weights of single cells."},
    {"usable", merge_usable, METH_VARARGS,
     "usable(scores, rest, k)\n\nWhether each cell has a finite logit, and none NaN or +inf."},
    {"unshuffle", merge_unshuffle, METH_VARARGS,
     "unshuffle(data, out, width)\n\nUndo HDF5's byte shuffle of items of `width` bytes."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_merge",
    .m_doc = "Sparse averages of a score map over patches.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__merge(void)
{
    return PyModuleDef_Init(&definition);
}
